"""Studies: methods compared at equal budget, over several seeds, from one YAML file to a table and its plots."""
