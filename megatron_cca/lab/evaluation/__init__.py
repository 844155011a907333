"""Evaluation of samples: class accuracy, Inception Score, FID, and plots."""
