"""Figures, intervals and tables: what people look at."""
