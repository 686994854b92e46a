"""accelerate's checkpoints and optimizers, for optimizers that return another model."""

from typing import Any

from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import DistributedType

from ..batchnorm import warn_of_statistics
from ..hosts import check_reach, holding, swapping, unwrapped


def attach(accelerator: Accelerator) -> None:
    """Have an accelerator save the average as the model, and its optimizers show what they have.

        model, opt, data = accelerator.prepare(model, PACE(model.parameters(), lr=4e-3), data)
        attach(accelerator)

    It is for PACE, Pullback, and every optimizer whose `eval()` puts the returned weights into the
    model and whose `train()` takes them out.

    - `accelerator.save_state` writes the returned model, whatever is in the model now. The live
      weights are in the optimizer's file beside it.
    - `accelerator.load_state` puts the live weights into the model: bit for bit with PACE and
      Pullback. Loaded without `attach`, such a folder is refused by the first step until
      `opt.train()`, which brings the same.
    - The prepared optimizer has all that the one in it has: `averaged()`, `averaged_state_dict()`,
      `swapped`, `stats()` and so on.

    Call it after `prepare`, and again after a later one.

    Raises:
        ValueError: none of the prepared optimizers does so, or the engine (FSDP1, DeepSpeed,
            Megatron-LM) keeps the weights elsewhere.
    """
    if accelerator.distributed_type in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise ValueError(
            f"attach() does not go with {accelerator.distributed_type.value}, which saves weights "
            "of its own; use FSDP2 (fsdp_version 2)"
        )
    optimizers = [x for x in accelerator._optimizers if swapping(x)]
    if not optimizers:
        raise ValueError(
            "attach() needs an optimizer that averages; call accelerator.prepare first"
        )
    for optimizer in optimizers:
        check_reach(optimizer, *accelerator._models)
        optimizer.__class__ = _ShowingOptimizer
    for model in accelerator._models:
        warn_of_statistics(model, stacklevel=2)
    kind = type(accelerator)
    if not issubclass(kind, _SavingAverages):
        accelerator.__class__ = type(kind.__name__, (_SavingAverages, kind), {})


class _SavingAverages(Accelerator):  # type: ignore[misc]
    """Saves the returned models, and goes on from the live weights."""

    def save_state(self, *args: Any, **kwargs: Any) -> Any:
        with holding(self._optimizers, "eval"):
            return super().save_state(*args, **kwargs)

    def load_state(self, *args: Any, **kwargs: Any) -> None:
        super().load_state(*args, **kwargs)
        for optimizer in filter(None, map(swapping, self._optimizers)):
            optimizer.train()


class _ShowingOptimizer(AcceleratedOptimizer):  # type: ignore[misc]
    """Has what the optimizer in it has, besides accelerate's own."""

    def eval(self, *name: str) -> None:
        unwrapped(self).eval(*name)

    def __getattr__(self, name: str) -> Any:
        return getattr(unwrapped(self), name)
