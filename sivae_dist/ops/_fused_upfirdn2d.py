"""`torch.ops.sivae.upfirdn2d`: declaration, shapes and derivative of the kernels in `kernels/upfirdn2d`.

The derivative of an upfirdn2d is one itself, with up and down exchanged and the filter turned round.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sivae_dist.ops import _library
from sivae_dist.ops._arguments import layout

Pads = tuple[int, int, int, int]
_SCHEMA = (
    "(Tensor x, Tensor? f, int up_x, int up_y, int down_x, int down_y, "
    "int pad_x0, int pad_x1, int pad_y0, int pad_y1, bool flip, float gain) -> Tensor"
)


def fused_upfirdn2d(
    x: Tensor, f: Tensor | None, up: tuple[int, int], down: tuple[int, int], pads: Pads, flip: bool, gain: float
) -> Tensor:
    """As `upfirdn2d` with arguments in their full form, by the kernels of x's device."""
    if f is not None:
        f = f.detach().to(x.device, _library.wide_dtype(x)).contiguous()
    y: Tensor = torch.ops.sivae.upfirdn2d(x, f, *up, *down, *pads, flip, gain)
    return y


def _fake(
    x: Tensor,
    f: Tensor | None,
    up_x: int,
    up_y: int,
    down_x: int,
    down_y: int,
    pad_x0: int,
    pad_x1: int,
    pad_y0: int,
    pad_y1: int,
    flip: bool,
    gain: float,
) -> Tensor:
    taps_y, taps_x = (1, 1) if f is None else (f.shape[0], f.shape[-1])
    height = (x.shape[2] * up_y + pad_y0 + pad_y1 - taps_y) // down_y + 1
    width = (x.shape[3] * up_x + pad_x0 + pad_x1 - taps_x) // down_x + 1
    sizes = (x.shape[0], x.shape[1], height, width)
    return torch.empty(sizes, dtype=x.dtype, device=x.device, memory_format=layout(x))


def transposed(
    size: tuple[int, int], out: tuple[int, int], taps: tuple[int, int], up: tuple[int, int], down: tuple[int, int],
    pads: Pads,
) -> Pads:  # fmt: skip
    """Padding of the derivative. size, out: (x, y) of the map and of the result; the rest is the forward's."""
    sides = []
    for axis in range(2):
        before = taps[axis] - pads[2 * axis] - 1
        after = size[axis] * up[axis] - out[axis] * down[axis] + pads[2 * axis] - up[axis] + 1
        sides += [before, after]
    return sides[0], sides[1], sides[2], sides[3]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, f, up_x, up_y, down_x, down_y, *pads, flip, gain = inputs
    ctx.save_for_backward(f)
    taps = (1, 1) if f is None else (f.shape[-1], f.shape[0])
    size, out = (x.shape[3], x.shape[2]), (output.shape[3], output.shape[2])
    sides = transposed(size, out, taps, (up_x, up_y), (down_x, down_y), tuple(pads))
    ctx.layout = layout(x)
    ctx.arguments = (down_x, down_y, up_x, up_y, *sides, not flip, gain)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    (f,) = ctx.saved_tensors
    gradient = gradient.contiguous(memory_format=ctx.layout)
    return torch.ops.sivae.upfirdn2d_backward(gradient, f, *ctx.arguments), *[None] * 11


_library.define("upfirdn2d", _SCHEMA, _fake)
_library.define("upfirdn2d_backward", _SCHEMA, _fake)
_library.derivative("upfirdn2d", _setup, _backward)
_library.no_derivative("upfirdn2d_backward")
