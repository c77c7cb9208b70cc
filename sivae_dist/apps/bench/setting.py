"""Where and with what operators are measured, and the two cases that each of them has."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sivae_dist.apps.bench.core import Case

Call = Callable[..., Tensor]
RESOLUTIONS = {256: 64, 1024: 32}  # channels of the recipes' largest maps


@dataclass(frozen=True)
class Setting:
    """Where and with what the cases run."""

    device: torch.device
    dtype: torch.dtype
    channels_last: bool
    batch: int | None
    """Images; None: 4 of 256 px or 1 of 1024 px on a CPU, 32 or 4 (the recipes' micro-batches) elsewhere."""
    compiled: bool
    px: tuple[int, ...] = (256, 1024)
    """Of `RESOLUTIONS`, those whose shapes are measured."""

    def images(self, resolution: int) -> int:
        """The batch at this resolution."""
        small = self.device.type == "cpu"
        return self.batch or ({256: 4, 1024: 1} if small else {256: 32, 1024: 4})[resolution]

    def drawn(self, *shape: int) -> Tensor:
        """A map of standard normal numbers."""
        x = torch.randn(shape, device=self.device, dtype=torch.float32).to(self.dtype)
        return x.contiguous(memory_format=torch.channels_last) if self.channels_last else x


def both(
    s: Setting,
    operator: str,
    name: str,
    shapes: list[tuple[int, ...]],
    ours: Call,
    plain: Call,
    forward_bytes: int,
    flops: int,
    both_bytes: int,
    others: dict[str, Call] | None = None,
) -> Iterator[Case]:
    """The forward pass alone, then forward and backward. others: what else to compare with, by name."""
    calls = {"kernel": ours, **(others or {}), "eager": plain}
    if s.compiled:
        calls["compile"] = torch.compile(plain)

    def alone(call: Call) -> Call:
        @torch.no_grad()
        def function(*inputs: Tensor) -> Tensor:
            return call(*inputs)

        return function

    def trained(call: Call) -> Call:
        def function(*inputs: Tensor) -> Tensor:
            leaves = [x.detach().requires_grad_() for x in inputs[:-1]]
            y = call(*leaves)
            torch.autograd.backward(y, inputs[-1])
            return y

        return function

    def inputs() -> tuple[Tensor, ...]:
        return tuple(s.drawn(*shape) for shape in shapes)

    yield Case(operator, name, inputs, {k: alone(c) for k, c in calls.items()}, forward_bytes, flops)
    out = ours(*inputs()).shape

    def with_gradient() -> tuple[Tensor, ...]:
        return (*inputs(), s.drawn(*out))

    yield Case(
        operator, f"{name} + backward", with_gradient, {k: trained(c) for k, c in calls.items()}, both_bytes, 2 * flops
    )
