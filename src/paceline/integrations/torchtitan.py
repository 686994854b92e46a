"""torchtitan's containers for optimizers that average: three entries of its configuration."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torchtitan.components.checkpointer import CheckpointManager
from torchtitan.components.optimizer import OptimizersContainer, ParamGroupConfig
from torchtitan.components.validate import Validator

from ..batchnorm import warn_of_statistics
from ..hosts import check_reach, holding, swapping
from ..optimizer import PACE

ADAMW_OPTIONS = ("fused", "foreach")  # which torchtitan gives to every optimizer


class PaceOptimizers(OptimizersContainer):  # type: ignore[misc]
    """Knows PACE by its name, beside torchtitan's own.

        optimizer=pace(lr=1.2e-3),
        validator=ReturnValidator.Config(...),
        checkpoint=ReturnCheckpoints.Config(...),

    Groups of other options are those of `OptimizersContainer`, with `optimizer_name="PACE"`.

    Raises:
        ValueError: an engine keeps the weights elsewhere, or an option is out of its range.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(OptimizersContainer.Config):  # type: ignore[misc]
        """As torchtitan's own."""

    def __init__(self, config: Any, *, model_parts: list[nn.Module]) -> None:
        super().__init__(config, model_parts=model_parts)
        for optimizer in filter(swapping, self.optimizers):
            check_reach(optimizer, *model_parts)
        for part in model_parts:
            warn_of_statistics(part, stacklevel=2)

    @staticmethod
    def _resolve_optimizer_factory(name: str) -> Callable[..., Optimizer]:
        if name != "PACE":
            found: Callable[..., Optimizer] = OptimizersContainer._resolve_optimizer_factory(name)
            return found
        return _make


def _make(groups: list[dict[str, Any]], **options: Any) -> PACE:
    """PACE chooses its kernel by itself."""
    plain = [{k: x for k, x in group.items() if k not in ADAMW_OPTIONS} for group in groups]
    return PACE(plain, **options)


def pace(lr: float = 8e-4, **options: Any) -> PaceOptimizers.Config:
    """All parameters by PACE, with the defaults of torchtitan's `default_adamw`.

    Args:
        lr: learning rate.
        options: of PACE, for all parameters.
    """
    given = {"lr": lr, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, **options}
    group = ParamGroupConfig(pattern=r".*", optimizer_name="PACE", optimizer_kwargs=given)
    return PaceOptimizers.Config(param_groups=[group])


class ReturnValidator(Validator):  # type: ignore[misc]
    """Validates the returned model."""

    @dataclass(kw_only=True, slots=True)
    class Config(Validator.Config):  # type: ignore[misc]
        """As torchtitan's own."""

    def validate(self, model_parts: list[nn.Module], step: int) -> None:
        """Validate with the average in the model."""
        with holding(self.metrics_processor.optimizers, "eval"):
            super().validate(model_parts, step)


class ReturnCheckpoints(CheckpointManager):  # type: ignore[misc]
    """Saves the returned model, and goes on from the live weights, which the optimizer has.

    That holds for checkpoints, for the model alone at the last step, and for Hugging Face's format.
    Pinned memory is filled before training goes on.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(CheckpointManager.Config):  # type: ignore[misc]
        """As torchtitan's own."""

    def __init__(self, config: Any, *, optimizers: OptimizersContainer, **parts: Any) -> None:
        self._averaging = optimizers
        super().__init__(config, optimizers=optimizers, **parts)

    def _save(self, curr_step: int, last_step: bool = False) -> bool:
        if not self._should_save(curr_step, last_step):  # it is asked at each step
            return False
        with holding(self._averaging, "eval"):
            saved: bool = super()._save(curr_step, last_step)
            self._maybe_wait_for_staging()
        return saved

    def _load(self, step: int = -1) -> bool:
        loaded: bool = super()._load(step)
        for optimizer in filter(None, map(swapping, self._averaging)):
            optimizer.train()
        return loaded
