"""What norm_act is compared on, by every build of its kernels."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from lanes import close, drawn
from torch import Tensor, nn

from sivae_dist.ops.norm_act import norm_act_reference

# Whole and broken packs, odd sizes, more pixels than a block takes at once, maps of one pixel.
SHAPES = [(2, 8, 4, 8), (3, 72, 5, 7), (2, 6, 40, 33), (4, 4, 1, 1), (2, 66, 3, 2)]
KINDS = ["batch", "group", "evaluated", "paused", "plain"]
HOW = list(itertools.product((None, "last", "first"), ("none", "down", "up")))


def make(kind: str, channels: int, *, double: bool = False) -> nn.Module:
    norm: nn.Module = nn.BatchNorm2d(channels, momentum=0.3, affine=kind != "plain")
    if kind == "group":
        norm = nn.GroupNorm(channels // 2, channels)
    for k, parameter in enumerate(norm.parameters()):
        parameter.data.copy_(drawn(channels, seed=20 + k))
    if kind == "evaluated":
        norm.running_mean.copy_(drawn(channels, seed=22))
        norm.running_var.copy_(drawn(channels, seed=23).square() + 0.5)
        norm.eval()
    if kind == "paused":
        norm.track_running_stats = False
    return norm.double() if double else norm


def fitting(shapes: list[Any]) -> Iterator[tuple[tuple[int, ...], str | None, str]]:
    for shape, (where, resample) in itertools.product(shapes, HOW):
        if resample != "down" or min(shape[2:]) > 1:
            yield shape, where, resample


def compare(
    call: Callable[..., Tensor],
    x: Tensor,
    kind: str,
    where: str | None,
    resample: str,
    layout: Any,
    device: str = "cpu",
) -> None:
    """Values, gradients of everything, running statistics, type and layout, against the reference in float64."""
    dtype, channels = x.dtype, x.shape[1]
    norm = make(kind, channels, double=dtype == torch.float64).to(device)
    other = copy.deepcopy(norm).double()
    skip = None
    if where:
        skip = drawn(*x.shape, seed=7).to(device, dtype).contiguous(memory_format=layout).requires_grad_()
    leaves = [t for t in (x.detach().clone().requires_grad_(), skip) if t is not None]
    twins = [t.detach().double().requires_grad_() for t in leaves]
    how: dict[str, Any] = {"skip_first": where == "first", "resample": resample, "alpha": 0.2}
    found = call(leaves[0], norm, skip, **how)
    wanted = norm_act_reference(twins[0], other, twins[1] if where else None, **how)
    close(found, wanted.detach())
    assert found.dtype == dtype and found.shape == wanted.shape
    assert found.is_contiguous(memory_format=torch.contiguous_format if x.is_contiguous() else layout)

    weight = drawn(*found.shape, seed=8).to(device, dtype)
    ours = torch.autograd.grad(found, [*leaves, *norm.parameters()], weight)
    theirs = torch.autograd.grad(wanted, [*twins, *other.parameters()], weight.double())
    # One pixel in groups of two channels: a difference is divided by another one, which may be small.
    slack = 50.0 if x.shape[2] * x.shape[3] == 1 and kind == "group" else 2.0
    for one, two in zip(ours, theirs, strict=True):
        assert one.shape == two.shape
        close(one.to(dtype), two, slack * max(1.0, float(two.abs().max())))
    for (name, one), two in zip(norm.named_buffers(), other.buffers(), strict=True):
        if name == "num_batches_tracked":
            assert torch.equal(one, two)
        else:
            torch.testing.assert_close(one.double(), two.double(), rtol=1e-5, atol=1e-5)
