"""`torch.ops.sivae.modulated_epilogue`: shapes and derivative of the kernels in `kernels/modulated_conv2d`.

The same with the filter of a transposed convolution before it: `_fused_modulated_fir`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sivae_dist.ops import _library
from sivae_dist.ops._arguments import layout

_NO_CLAMP = -1.0
_SIDES = "Tensor x, Tensor scale, Tensor? noise, Tensor? strength, Tensor? bias, Tensor? next"
_NUMBERS = "float alpha, float gain, float clamp"
_SCHEMA = f"({_SIDES}, {_NUMBERS}, bool both) -> (Tensor, Tensor)"
_BACKWARD_SCHEMA = (
    f"(Tensor? gradient, Tensor? grad_scaled, {_SIDES}, {_NUMBERS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def fused_epilogue(
    x: Tensor,
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
    """As `epilogue_reference`, by the kernels of x's device."""
    sides = as_wide(x, scale, noise, strength, bias, following)
    y, scaled = torch.ops.sivae.modulated_epilogue(x, *sides, alpha, gain, bound_of(clamp), plain)
    return y if plain else None, None if following is None else scaled


def as_wide(x: Tensor, *sides: Tensor | None) -> list[Tensor | None]:
    """What a map is worked on with, as its kernels take it."""
    return [None if t is None else t.to(x.device, _library.wide_dtype(x)).contiguous() for t in sides]


def bound_of(clamp: float | None) -> float:
    """The number by which kernels know a clamp, and that there is none."""
    return _NO_CLAMP if clamp is None else float(clamp)


def _like(x: Tensor, wanted: bool = True) -> Tensor:
    sizes = x.shape if wanted else (0, 1, 1, 1)
    return torch.empty(sizes, dtype=x.dtype, device=x.device, memory_format=layout(x))


def _fake(
    x: Tensor,
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
    return _like(x, both or next is None), _like(x, next is not None)


def _backward_fake(
    gradient: Tensor | None, grad_scaled: Tensor | None, x: Tensor, scale: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    channels = x.shape[1]
    one, two = (scale.new_empty(x.shape[:2]) for _ in range(2))
    return _like(x), one, scale.new_empty(channels), scale.new_empty(()), two


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, scale, noise, strength, bias, following, *numbers, both = inputs
    ctx.save_for_backward(x, scale, noise, strength, bias, following)
    ctx.numbers, ctx.layout = numbers, layout(x)
    ctx.written = (both or following is None, following is not None)


def _backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
    x, scale, noise, strength, bias, following = ctx.saved_tensors
    there = [
        g.contiguous(memory_format=ctx.layout) if written else None
        for g, written in zip(gradients, ctx.written, strict=True)
    ]
    dx, dscale, dbias, dstrength, dnext = torch.ops.sivae.modulated_epilogue_backward(
        *there, x, scale, noise, strength, bias, following, *ctx.numbers
    )
    dnoise = None
    if ctx.needs_input_grad[2]:  # never in training: noise is drawn, not learnt
        # dx / scale is the gradient before the demodulation, which is never zero.
        dnoise = strength * (dx.to(noise.dtype) / scale[:, :, None, None]).sum(dim=1, keepdim=True)
        dnoise = dnoise.sum_to_size(noise.shape)
    return (
        dx,
        dscale,
        dnoise,
        None if strength is None else dstrength,
        None if bias is None else dbias,
        None if following is None else dnext,
        None,
        None,
        None,
        None,
    )


_library.define("modulated_epilogue", _SCHEMA, _fake)
_library.define("modulated_epilogue_backward", _BACKWARD_SCHEMA, _backward_fake)
_library.derivative("modulated_epilogue", _setup, _backward)
_library.no_derivative("modulated_epilogue_backward")
