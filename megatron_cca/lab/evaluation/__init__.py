"""How good samples are: class accuracy, Inception Score, FID, and the pictures."""
