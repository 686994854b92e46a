"""paceline: train the model you return."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the public API, as type checkers see it
    from .averaging import BEMA, EMA, LAWA, SWA, Averaging, PowerEMA, Uniform
    from .base import Choice
    from .batchnorm import recomputed_statistics
    from .checkpoint import load_checkpoint, save_checkpoint
    from .elastic import Elastic
    from .optimizer import PACE
    from .pullback import Pullback
    from .synthesis import Snapshot, Synthesis, snapshot_steps, synthesize

# The same at run time: module -> names. Each is imported when it is first asked for, since torch
# takes seconds, which the help of a command need not.
_PUBLIC = {
    "averaging": ["BEMA", "EMA", "LAWA", "SWA", "Averaging", "PowerEMA", "Uniform"],
    "base": ["Choice"],
    "batchnorm": ["recomputed_statistics"],
    "checkpoint": ["load_checkpoint", "save_checkpoint"],
    "elastic": ["Elastic"],
    "optimizer": ["PACE"],
    "pullback": ["Pullback"],
    "synthesis": ["Snapshot", "Synthesis", "snapshot_steps", "synthesize"],
}

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

if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        """A public name, or the module of one, imported at its first use."""
        if name in _PUBLIC:
            return import_module(f"{__name__}.{name}")
        for module, names in _PUBLIC.items():
            if name in names:
                value = getattr(import_module(f"{__name__}.{module}"), name)
                globals()[name] = value
                return value
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
