"""EMF: few-step text-to-image flow maps (arXiv 2604.18168)."""

__version__ = "0.1.0"
