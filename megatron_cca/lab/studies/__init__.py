"""Studies: a comparison of methods at equal budget, over several seeds, from one YAML file to a table and plots."""
