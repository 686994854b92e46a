"""paceline: train the model you return."""

from .optimizer import PACE
from .update import averaging_weight

__all__ = ["PACE", "averaging_weight"]
__version__ = "0.1.0"
