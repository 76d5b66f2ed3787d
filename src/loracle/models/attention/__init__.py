"""Attention over a packed token tree: plan, the two ways to compute it, and the function that transformers calls."""
