"""Losses, the optimizer, checkpoints and the one visible loop."""
