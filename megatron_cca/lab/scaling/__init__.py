"""Weak and strong scaling: short real runs on what is at hand, plans for what is not, one table and one picture."""
