"""The model: base, adapters, head, and attention over packed texts."""
