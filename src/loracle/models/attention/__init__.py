"""Attention over a packed token tree."""
