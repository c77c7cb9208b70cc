"""`torch.ops.sivae.modulated_fir_epilogue`: the filter of a transposed convolution and the epilogue in one pass.

See `kernels/modulated_conv2d`; `_fused_modulated` has the epilogue alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sivae_dist.ops import _library
from sivae_dist.ops._arguments import layout
from sivae_dist.ops._fused_modulated import _NUMBERS, as_wide, bound_of
from sivae_dist.ops._fused_upfirdn2d import transposed

Pads = tuple[int, int, int, int]
TAPS = 4
_FILTER = "Tensor f, int pad_x0, int pad_x1, int pad_y0, int pad_y1, bool flip, float fir_gain"
_SIDES = "Tensor scale, Tensor? noise, Tensor? strength, Tensor? bias, Tensor? next"
_SCHEMA = f"(Tensor x, {_FILTER}, {_SIDES}, {_NUMBERS}, bool both) -> (Tensor, Tensor)"
_BACKWARD_SCHEMA = (
    f"(Tensor? gradient, Tensor? grad_scaled, Tensor x, {_FILTER}, {_SIDES}, {_NUMBERS})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def serves_filter(f: Tensor | None, pads: Pads) -> bool:
    """Whether the operator knows this filter with this padding; others are a pass of their own."""
    return f is not None and set(f.shape) == {TAPS} and all(0 <= pad < TAPS for pad in pads)


def fused_fir_epilogue(
    x: Tensor,
    f: Tensor,
    pads: Pads,
    flip: bool,
    fir_gain: float,
    scale: Tensor,
    noise: Tensor | None,
    strength: Tensor | None,
    bias: Tensor | None,
    following: Tensor | None,
    alpha: float,
    gain: float,
    clamp: float | None,
    plain: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """`upfirdn2d(x, f, 1, 1, pads, flip, fir_gain)`, then `epilogue_reference`, by the kernels of x's device."""
    (taps,) = as_wide(x, f.detach())
    assert taps is not None
    taps = torch.outer(taps, taps) if f.ndim == 1 else taps
    sides = as_wide(x, scale, noise, strength, bias, following)
    y, scaled = torch.ops.sivae.modulated_fir_epilogue(
        x, taps, *pads, flip, fir_gain, *sides, alpha, gain, bound_of(clamp), plain
    )
    return y if plain else None, None if following is None else scaled


def _fake(
    x: Tensor,
    f: Tensor,
    pad_x0: int,
    pad_x1: int,
    pad_y0: int,
    pad_y1: int,
    flip: bool,
    fir_gain: float,
    scale: Tensor,
    noise: Tensor | None,
    strength: Tensor | None,
    bias: Tensor | None,
    next: Tensor | None,
    alpha: float,
    gain: float,
    clamp: float,
    both: bool,
) -> tuple[Tensor, Tensor]:
    height, width = x.shape[2] + pad_y0 + pad_y1 - TAPS + 1, x.shape[3] + pad_x0 + pad_x1 - TAPS + 1

    def like(wanted: bool) -> Tensor:
        sizes = (x.shape[0], x.shape[1], height, width) if wanted else (0, 1, 1, 1)
        return torch.empty(sizes, dtype=x.dtype, device=x.device, memory_format=layout(x))

    return like(both or next is None), like(next is not None)


def _backward_fake(
    gradient: Tensor | None, grad_scaled: Tensor | None, x: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    channels, scale = x.shape[1], rest[7]
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=layout(x))
    one, two = (scale.new_empty(x.shape[:2]) for _ in range(2))
    return dx, one, scale.new_empty(channels), scale.new_empty(()), two


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, f, *how, scale, noise, strength, bias, following, alpha, gain, clamp, both = inputs
    ctx.save_for_backward(x, f, scale, noise, strength, bias, following)
    ctx.how, ctx.numbers, ctx.layout = how, (alpha, gain, clamp), layout(x)
    ctx.written = (both or following is None, following is not None)


def _backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
    x, f, scale, noise, strength, bias, following = ctx.saved_tensors
    there = [
        g.contiguous(memory_format=ctx.layout) if written else None
        for g, written in zip(gradients, ctx.written, strict=True)
    ]
    sides = (scale, noise, strength, bias, following)
    ops, dnoise = torch.ops.sivae, None
    if ctx.needs_input_grad[9]:  # noise is drawn, not learnt: no pass is made for its sake in training
        dx, dscale, dbias, dstrength, dnext, dnoise = _in_two_passes(ctx, there, x, f, sides)
    else:
        dx, dscale, dbias, dstrength, dnext = ops.modulated_fir_epilogue_backward(
            *there, x, f, *ctx.how, *sides, *ctx.numbers
        )
    return (
        dx,
        *[None] * 7,
        dscale,
        dnoise,
        None if strength is None else dstrength,
        None if bias is None else dbias,
        None if following is None else dnext,
        *[None] * 4,
    )


def _in_two_passes(
    ctx: Any, there: list[Tensor | None], x: Tensor, f: Tensor, sides: tuple[Any, ...]
) -> tuple[Tensor, ...]:
    """The gradients with that of the noise, for which the filtered map's is written; unrounded, as in one pass."""
    *pads, flip, fir_gain = ctx.how
    scale, noise, strength = sides[:3]
    ops = torch.ops.sivae
    u = ops.upfirdn2d(x.to(scale.dtype), f, 1, 1, 1, 1, *pads, flip, fir_gain)
    wide = (None if g is None else g.to(scale.dtype) for g in there)
    du, *sums = ops.modulated_epilogue_backward(*wide, u, *sides, *ctx.numbers)
    dnoise = strength * (du / scale[:, :, None, None]).sum(dim=1, keepdim=True)
    size, out = (x.shape[3], x.shape[2]), (u.shape[3], u.shape[2])
    back = transposed(size, out, (TAPS, TAPS), (1, 1), (1, 1), tuple(pads))
    dx = ops.upfirdn2d_backward(du, f, 1, 1, 1, 1, *back, not flip, fir_gain)
    return dx.to(x.dtype), *sums, dnoise.sum_to_size(noise.shape)


_library.define("modulated_fir_epilogue", _SCHEMA, _fake)
_library.define("modulated_fir_epilogue_backward", _BACKWARD_SCHEMA, _backward_fake)
_library.derivative("modulated_fir_epilogue", _setup, _backward)
_library.no_derivative("modulated_fir_epilogue_backward")
