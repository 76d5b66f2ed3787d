"""The training loop, its losses, optimizer and checkpoints."""
