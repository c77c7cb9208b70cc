"""`torch.ops.sivae.adain_act`: declaration, shapes and derivative of the kernels in `kernels/adain_act`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sivae_dist.ops import _library
from sivae_dist.ops._arguments import layout

_SCHEMA = (
    "(Tensor x, Tensor? noise, Tensor? strength, Tensor? bias, Tensor? style, float eps, float alpha) "
    "-> (Tensor, Tensor, Tensor)"
)
_BACKWARD_SCHEMA = (
    "(Tensor gradient, Tensor x, Tensor? noise, Tensor? strength, Tensor? bias, Tensor? style, Tensor mean, "
    "Tensor std, Tensor grad_mean, Tensor grad_std, float eps, float alpha) -> (Tensor, Tensor, Tensor, Tensor)"
)


def fused_adain_act(
    x: Tensor,
    noise: Tensor | None,
    strength: Tensor | None,
    bias: Tensor | None,
    style: Tensor | None,
    eps: float,
    alpha: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `adain_act` with arguments taken to be right, by the kernels of x's device."""
    if style is not None and len(style) != len(x):
        x = x.expand(len(style), -1, -1, -1).contiguous(memory_format=layout(x))
    if noise is not None:
        noise = noise.expand(-1, -1, *x.shape[2:])
    noise, strength, bias, style = (None if t is None else _wide(t, x) for t in (noise, strength, bias, style))
    y, mean, std = torch.ops.sivae.adain_act(x, noise, strength, bias, style, eps, alpha)
    return y, mean, std


def _wide(side: Tensor, x: Tensor) -> Tensor:
    return side.to(x.device, _library.wide_dtype(x)).contiguous()


def _like(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=layout(x))


def _fake(
    x: Tensor,
    noise: Tensor | None,
    strength: Tensor | None,
    bias: Tensor | None,
    style: Tensor | None,
    eps: float,
    alpha: float,
) -> tuple[Tensor, Tensor, Tensor]:
    mean, std = (x.new_empty(x.shape[:2], dtype=_library.wide_dtype(x)) for _ in range(2))
    return _like(x), mean, std


def _backward_fake(
    gradient: Tensor,
    x: Tensor,
    noise: Tensor | None,
    strength: Tensor | None,
    bias: Tensor | None,
    style: Tensor | None,
    mean: Tensor,
    std: Tensor,
    grad_mean: Tensor,
    grad_std: Tensor,
    eps: float,
    alpha: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, channels = x.shape[:2]
    return _like(x), mean.new_empty(channels), mean.new_empty(channels), mean.new_empty(batch, 2 * channels)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, noise, strength, bias, style, eps, alpha = inputs
    _, mean, std = output
    ctx.save_for_backward(x, noise, strength, bias, style, mean, std)
    ctx.layout, ctx.numbers = layout(x), (eps, alpha)


def _backward(ctx: Any, gradient: Tensor, grad_mean: Tensor, grad_std: Tensor) -> tuple[Tensor | None, ...]:
    x, noise, strength, bias, style, mean, std = ctx.saved_tensors
    gradient = gradient.contiguous(memory_format=ctx.layout)
    dx, dstrength, dbias, dstyle = torch.ops.sivae.adain_act_backward(
        gradient, x, noise, strength, bias, style, mean, std, grad_mean.contiguous(), grad_std.contiguous(),
        *ctx.numbers,
    )  # fmt: skip
    dnoise = None
    if ctx.needs_input_grad[1]:  # never in training: noise is drawn, not learnt
        dnoise = (dx.to(noise.dtype) * strength[:, None, None]).sum(dim=1, keepdim=True).sum_to_size(noise.shape)
    return (
        dx,
        dnoise,
        None if strength is None else dstrength,
        None if bias is None else dbias,
        None if style is None else dstyle,
        None,
        None,
    )


_library.define("adain_act", _SCHEMA, _fake)
_library.define("adain_act_backward", _BACKWARD_SCHEMA, _backward_fake)
_library.derivative("adain_act", _setup, _backward)
_library.no_derivative("adain_act_backward")
