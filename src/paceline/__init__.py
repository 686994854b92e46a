"""paceline: train the model you return."""

from .checkpoint import load_checkpoint, save_checkpoint
from .optimizer import PACE

__all__ = ["PACE", "load_checkpoint", "save_checkpoint"]
__version__ = "0.1.0"
