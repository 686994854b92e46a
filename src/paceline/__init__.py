"""paceline: train the model you return."""

from .averaging import BEMA, EMA, LAWA, SWA, Averaging, PowerEMA, Uniform
from .base import Choice
from .batchnorm import recomputed_statistics
from .checkpoint import load_checkpoint, save_checkpoint
from .elastic import Elastic
from .optimizer import PACE
from .pullback import Pullback
from .synthesis import Snapshot, Synthesis, snapshot_steps, synthesize

__all__ = [
    "BEMA",
    "EMA",
    "LAWA",
    "PACE",
    "SWA",
    "Averaging",
    "Choice",
    "Elastic",
    "PowerEMA",
    "Pullback",
    "Snapshot",
    "Synthesis",
    "Uniform",
    "load_checkpoint",
    "recomputed_statistics",
    "save_checkpoint",
    "snapshot_steps",
    "synthesize",
]
__version__ = "0.1.0"
