"""Simpler methods that a model has to beat."""
