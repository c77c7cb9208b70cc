"""`torch.ops.sivae.bias_act`: declaration, shapes and derivative of the kernels in `kernels/bias_act`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sivae_dist.ops import _library
from sivae_dist.ops._arguments import layout

# In the order of the enumeration in kernels/bias_act/bias_act.h.
ACTS = ("linear", "relu", "lrelu", "tanh", "sigmoid", "elu", "selu", "softplus", "swish")
_NO_CLAMP = -1.0

_SCHEMA = (
    "(Tensor x, Tensor? bias, Tensor? noise, Tensor? strength, int act, float alpha, float gain, float clamp) -> Tensor"
)
_BACKWARD_SCHEMA = (
    "(Tensor gradient, Tensor? saved, Tensor? bias, Tensor? noise, Tensor? strength, int act, float alpha, float gain, "
    "float clamp, bool from_output, bool want_bias, bool want_strength) -> (Tensor, Tensor, Tensor)"
)


def fused_bias_act(
    x: Tensor,
    bias: Tensor | None,
    noise: Tensor | None,
    strength: Tensor | None,
    act: str,
    alpha: float,
    gain: float,
    clamp: float | None,
) -> Tensor:
    """As `bias_act` with arguments in their full form, by the kernels of x's device."""
    bias, noise, strength = (None if t is None else _wide(t, x) for t in (bias, noise, strength))
    bound = _NO_CLAMP if clamp is None else float(clamp)
    y: Tensor = torch.ops.sivae.bias_act(x, bias, noise, strength, ACTS.index(act), alpha, gain, bound)
    return y


def _wide(side: Tensor, x: Tensor) -> Tensor:
    return side.to(x.device, _library.wide_dtype(x)).contiguous()


def _like(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=layout(x))


def _fake(
    x: Tensor,
    bias: Tensor | None,
    noise: Tensor | None,
    strength: Tensor | None,
    act: int,
    alpha: float,
    gain: float,
    clamp: float,
) -> Tensor:
    return _like(x)


def _backward_fake(
    gradient: Tensor,
    saved: Tensor | None,
    bias: Tensor | None,
    noise: Tensor | None,
    strength: Tensor | None,
    act: int,
    alpha: float,
    gain: float,
    clamp: float,
    from_output: bool,
    want_bias: bool,
    want_strength: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    wide = gradient.new_empty((), dtype=_library.wide_dtype(gradient))
    dbias = wide.new_empty(gradient.shape[1] if want_bias else 0)
    return _like(gradient), dbias, wide.new_empty(() if want_strength else (0,))


def source(act: str, alpha: float, gain: float, clamp: float) -> str:
    """What the derivative is taken from: nothing, the output or the input.

    The output tells it if it rises with the input, which a leaky ReLU with a negative slope does not. Its clamped
    values are those at the bound, where the derivative counts as zero.
    """
    if act == "linear" and clamp < 0:
        return "nothing"
    return "input" if act == "swish" or gain <= 0 or (act == "lrelu" and alpha < 0) else "output"


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, bias, noise, strength, act, alpha, gain, clamp = inputs
    ctx.source = source(ACTS[act], alpha, gain, clamp)
    ctx.save_for_backward({"nothing": None, "output": output, "input": x}[ctx.source], bias, noise, strength)
    ctx.layout = layout(x)
    ctx.numbers = (act, alpha, gain, clamp, ctx.source == "output")


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    saved, bias, noise, strength = ctx.saved_tensors
    _, want_bias, want_noise, want_strength, *_ = ctx.needs_input_grad
    gradient = gradient.contiguous(memory_format=ctx.layout)
    if saved is not None:
        saved = saved.contiguous(memory_format=ctx.layout)
    dx, dbias, dstrength = torch.ops.sivae.bias_act_backward(
        gradient, saved, bias, noise, strength, *ctx.numbers, want_bias, want_strength
    )
    dnoise = None
    if want_noise:  # never in training: noise is drawn, not learnt
        dnoise = strength * dx.sum(dim=1, keepdim=True, dtype=noise.dtype)
        dnoise = dnoise.sum_to_size(noise.shape)
    return dx, dbias if want_bias else None, dnoise, dstrength if want_strength else None, None, None, None, None


_library.define("bias_act", _SCHEMA, _fake)
_library.define("bias_act_backward", _BACKWARD_SCHEMA, _backward_fake)
_library.derivative("bias_act", _setup, _backward)
_library.no_derivative("bias_act_backward")
