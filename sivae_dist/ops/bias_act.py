"""Bias, noise, activation, gain and clamp in one pass over a feature map."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from sivae_dist.ops import kernels
from sivae_dist.ops._arguments import finish, wide
from sivae_dist.ops._fused_bias_act import fused_bias_act


class Activation(NamedTuple):
    """A function of (x, alpha), and what alpha and gain are when nobody says."""

    function: Callable[[Tensor, float], Tensor]
    alpha: float
    gain: float


# The gains keep the second moment of a standard normal input about one where the activation halves it.
ACTIVATIONS: dict[str, Activation] = {
    "linear": Activation(lambda x, alpha: x, 0.0, 1.0),
    "relu": Activation(lambda x, alpha: functional.relu(x), 0.0, math.sqrt(2.0)),
    "lrelu": Activation(functional.leaky_relu, 0.2, math.sqrt(2.0)),
    "tanh": Activation(lambda x, alpha: torch.tanh(x), 0.0, 1.0),
    "sigmoid": Activation(lambda x, alpha: torch.sigmoid(x), 0.0, 1.0),
    "elu": Activation(lambda x, alpha: functional.elu(x), 0.0, 1.0),
    "selu": Activation(lambda x, alpha: functional.selu(x), 0.0, 1.0),
    "softplus": Activation(lambda x, alpha: functional.softplus(x), 0.0, 1.0),
    "swish": Activation(lambda x, alpha: functional.silu(x), 0.0, math.sqrt(2.0)),
}


def bias_act(
    x: Tensor,
    bias: Tensor | None = None,
    noise: Tensor | None = None,
    noise_strength: Tensor | None = None,
    act: str = "lrelu",
    alpha: float | None = None,
    gain: float | None = None,
    clamp: float | None = None,
) -> Tensor:
    """y = min(max(gain * act(x + noise_strength * noise + bias), -clamp), clamp).

    x: (B, C, ...), any floating dtype, contiguous or channels_last; B may be 0.
    bias: (C,) or None. noise: (B or 1, 1, ...) with the space of x, or None; noise_strength: one number, shape ().
    act: linear, relu, lrelu (slope alpha below zero), tanh, sigmoid, elu, selu, softplus or swish (x sigmoid(x)).
    alpha, gain: None for the activation's own (0.2 for lrelu; sqrt(2) for relu, lrelu and swish; else 1).
    clamp: None clamps nothing; the gradient is zero beyond it.
    Returns x's shape, dtype and layout; computed in float32 (float64 for float64). bias, noise and noise_strength may
    be of another floating dtype; autocast changes nothing. Differentiable in all four tensors, twice only by the
    reference (see `kernels`).
    Raises ValueError for arguments of another kind.
    """
    if x.ndim < 2 or not x.is_floating_point():
        raise ValueError(f"x is {x.dtype} of shape {tuple(x.shape)}, expected a floating (B, C, ...)")
    if bias is not None and bias.shape != x.shape[1:2]:
        raise ValueError(f"bias has shape {tuple(bias.shape)}, expected {tuple(x.shape[1:2])}, one number a channel")
    if (noise is None) != (noise_strength is None):
        raise ValueError("noise and noise_strength come together: one of them is None")
    if noise is not None and (noise.shape[1:] != (1, *x.shape[2:]) or noise.shape[0] not in (1, x.shape[0])):
        raise ValueError(
            f"noise has shape {tuple(noise.shape)}, expected ({x.shape[0]} or 1, 1, *{tuple(x.shape[2:])})"
        )
    if noise_strength is not None and noise_strength.ndim:
        raise ValueError(f"noise_strength has shape {tuple(noise_strength.shape)}, expected one number, shape ()")
    if act not in ACTIVATIONS:
        raise ValueError(f"act is {act!r}, expected one of {', '.join(ACTIVATIONS)}")
    if clamp is not None and not clamp >= 0:
        raise ValueError(f"clamp is {clamp}, expected None or a number that is not negative")
    if kernels.selected(x):
        alpha = ACTIVATIONS[act].alpha if alpha is None else alpha
        gain = ACTIVATIONS[act].gain if gain is None else gain
        return fused_bias_act(x, bias, noise, noise_strength, act, alpha, gain, clamp)
    return bias_act_reference(x, bias, noise, noise_strength, act, alpha, gain, clamp)


def bias_act_reference(
    x: Tensor,
    bias: Tensor | None = None,
    noise: Tensor | None = None,
    noise_strength: Tensor | None = None,
    act: str = "lrelu",
    alpha: float | None = None,
    gain: float | None = None,
    clamp: float | None = None,
) -> Tensor:
    """The formula of `bias_act` in plain PyTorch. Arguments are taken to be right."""
    activation = ACTIVATIONS[act]
    with torch.autocast(x.device.type, enabled=False):
        y = wide(x)
        if noise is not None and noise_strength is not None:
            y = y + noise_strength.to(y) * noise.to(y)
        if bias is not None:
            y = y + bias.to(y).reshape(-1, *[1] * (x.ndim - 2))
        y = activation.function(y, activation.alpha if alpha is None else alpha)
        y = y * (activation.gain if gain is None else gain)
        if clamp is not None:
            y = y.clamp(-clamp, clamp)
        return finish(y, x)
