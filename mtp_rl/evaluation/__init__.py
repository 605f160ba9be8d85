"""Held-out accuracy of parameters, and of saved checkpoints."""
