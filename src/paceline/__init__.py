"""paceline: train the model you return."""

from .optimizer import PACE

__all__ = ["PACE"]
__version__ = "0.1.0"
