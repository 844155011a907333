"""Sampling images from checkpoints."""
