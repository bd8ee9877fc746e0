"""Weights on disk: reading, published layouts, conversion, a run's checkpoints, where a run starts, export."""
