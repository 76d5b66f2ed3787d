"""How good the scores are, and what simpler methods reach on the same split: metrics with intervals, and baselines."""
