"""Running averages of a network: buffers that a forward pass in training moves."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


@runtime_checkable
class Averaging(Protocol):
    """A module with running averages of its own, besides those of the batch norms in it."""

    def running_averages(self) -> Iterator[tuple[Tensor, float]]:
        """Each with the weight k of its old value: a forward pass makes it k old + (1 - k) new."""
        ...


def running_averages(network: nn.Module) -> Iterator[tuple[Tensor, float]]:
    """What a forward pass in training would move now, each with the weight of its old value.

    The number of batches that a batch norm has seen is among them: one is added to it, its weight is 1.
    Raises ValueError for a batch norm without momentum, whose weight changes from pass to pass.
    """
    for module in network.modules():
        if isinstance(module, Averaging):
            yield from module.running_averages()
        if not isinstance(module, _BatchNorm) or not module.track_running_stats:
            continue
        if module.momentum is None:
            raise ValueError("a batch norm with momentum None has no running average with a constant weight")
        for average in (module.running_mean, module.running_var):
            if average is not None:
                yield average, 1 - module.momentum
        if module.num_batches_tracked is not None:
            yield module.num_batches_tracked, 1


@contextmanager
def unmoved(*networks: nn.Module) -> Iterator[None]:
    """Within, averages that even evaluation moves come back to what they were: who looks at a model does not change it.

    Otherwise each rank would move them by its own part of the held-out data. (Evaluation leaves batch norms alone.)
    """
    modules = [module for network in networks for module in network.modules() if isinstance(module, Averaging)]
    before = [(average, average.clone()) for module in modules for average, _ in module.running_averages()]
    try:
        yield
    finally:
        with torch.no_grad():
            for average, value in before:
                average.copy_(value)
