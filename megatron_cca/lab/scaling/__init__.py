"""Weak and strong scaling: short real runs on this machine, plans for larger ones, one table and one plot."""
