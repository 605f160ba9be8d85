"""Joint training of multi-token prediction and RLVR in JAX (OCC)."""

__version__ = '0.1.0'
