"""The decoder and its multi-token prediction modules (Flax Linen)."""
