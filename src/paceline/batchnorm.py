"""Running statistics, as BatchNorm's, of the weights that are in a model now."""

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def layers_with_statistics(model: nn.Module) -> list[Any]:
    """The layers that keep running statistics: BatchNorm, SyncBatchNorm, InstanceNorm if it does.

    Any module counts that has a tensor `running_mean` and can `reset_running_stats()`.
    """
    return [
        layer
        for layer in model.modules()
        if isinstance(getattr(layer, "running_mean", None), Tensor)
        and hasattr(layer, "reset_running_stats")
    ]


def warn_of_statistics(model: nn.Module, stacklevel: int) -> None:
    """Warn, where a model has such layers, that their statistics stay those of the live weights."""
    if kinds := {type(layer).__name__ for layer in layers_with_statistics(model)}:
        warnings.warn(
            f"running statistics ({', '.join(sorted(kinds))}) stay those of the live weights where "
            "the returned model is evaluated and saved; paceline.recomputed_statistics computes "
            "its own",
            stacklevel=stacklevel + 1,
        )


@contextmanager
def recomputed_statistics(model: nn.Module, batches: Iterable[Any]) -> Iterator[None]:
    """Hold running statistics of the weights that are in the model now.

        with opt.averaged(), recomputed_statistics(model, loader):
            evaluate(model)

    They are the means over one pass of the batches in training mode, as `update_bn` of
    `torch.optim.swa_utils` computes them. At the end, also after an exception, the model has its
    buffers and its modes of training back. Layers in evaluation mode beside others in training mode
    are frozen: they keep their statistics. So does a layer that no batch reaches, with a warning.

    Torch's random numbers are drawn as if there were no pass. The pass moves Python's and NumPy's,
    and a generator that the loader has of its own: give a loader that training does not use.

    Args:
        model: on any device; batches are moved to that of its first parameter. Without such layers
            nothing is computed.
        batches: tensors, dicts (keyword arguments of the model), or tuples and lists that begin
            with one of these.

    Raises:
        ValueError: there is no batch.
    """
    buffers = [
        (module, name, buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    modes = [(module, module.training) for module in model.modules()]
    try:
        if layers := layers_with_statistics(model):
            _recompute(model, layers, batches)
            _set_modes(modes)
        yield
    finally:
        _set_modes(modes)
        with torch.no_grad():
            for module, name, before in buffers:
                now = module._buffers.get(name)
                if now is not None and now.shape == before.shape:
                    now.copy_(before)
                else:
                    module._buffers[name] = before


@torch.no_grad()
def _recompute(model: nn.Module, layers: list[Any], batches: Iterable[Any]) -> None:
    if not any(layer.training for layer in layers):
        model.train()
    layers = [layer for layer in layers if layer.training]
    momenta = [(layer, getattr(layer, "momentum", None)) for layer in layers]
    device = next((p.device for p in model.parameters()), None)
    count = 0
    cuda = [device] if device is not None and device.type == "cuda" else []
    before = [_copies(layer) for layer in layers]
    try:
        for layer in layers:
            layer.reset_running_stats()
        fresh = [_copies(layer) for layer in layers]
        with torch.random.fork_rng(cuda):
            for count, batch in enumerate(batches, 1):
                for layer in layers:  # a mean over all batches; without a momentum, BatchNorm's own
                    layer.momentum = None if isinstance(layer, _BatchNorm) else 1 / count
                inputs = batch[0] if isinstance(batch, (tuple, list)) else batch
                inputs = _moved(inputs, device)
                model(**inputs) if isinstance(inputs, Mapping) else model(inputs)
    finally:
        for layer, momentum in momenta:
            layer.momentum = momentum
    if not count:
        raise ValueError("batches has no batch to compute running statistics from; is it used up?")
    missed = []
    for layer, old, new in zip(layers, before, fresh, strict=True):
        if all(map(torch.equal, layer.buffers(), new)):
            missed.append(layer)
            for buffer, value in zip(layer.buffers(), old, strict=True):
                buffer.copy_(value)
    if missed:
        names = sorted(repr(name) for name, layer in model.named_modules() if layer in missed)
        warnings.warn(
            f"no batch reached {', '.join(names)}, which keep the running statistics they had",
            stacklevel=5,
        )


def _copies(layer: nn.Module) -> list[Tensor]:
    return [buffer.clone() for buffer in layer.buffers()]


def _moved(batch: Any, device: torch.device | None) -> Any:
    if device is not None and hasattr(batch, "to"):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {name: _moved(x, device) for name, x in batch.items()}
    if isinstance(batch, (tuple, list)):
        return tuple(_moved(x, device) for x in batch)
    return batch


def _set_modes(modes: list[tuple[nn.Module, bool]]) -> None:
    for module, training in modes:
        module.training = training
