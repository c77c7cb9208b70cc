"""Noise, bias, LeakyReLU, instance norm and style: what stands between two convolutions of the style networks.

Adaptive instance normalisation: Huang & Belongie, ICCV 2017; in this order: Karras et al., "A Style-Based Generator
Architecture for Generative Adversarial Networks", CVPR 2019.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from sivae_dist.ops import kernels
from sivae_dist.ops._arguments import check_map, finish, wide
from sivae_dist.ops._fused_adain_act import fused_adain_act

EPS = 1e-8  # of the norm, when nobody says
ALPHA = 0.2  # slope of the LeakyReLU below zero


def adain_act(
    x: Tensor,
    noise: Tensor | None = None,
    noise_strength: Tensor | None = None,
    bias: Tensor | None = None,
    style: Tensor | None = None,
    *,
    eps: float = EPS,
    alpha: float = ALPHA,
) -> tuple[Tensor, Tensor, Tensor]:
    """With a = leaky(x + noise_strength * noise + bias), and mean and var over the space of one channel of one sample,

        y = (1 + scale) * (a - mean(a)) / sqrt(var(a) + eps) + shift,   mean(a),   sqrt(var(a)).

    leaky(v) is v above zero, alpha * v below. The variance divides by H W; the deviation that is returned has no eps.

    x: (B, C, H, W), any floating dtype, contiguous or channels_last; B may be 0.
    noise: (B or 1, 1, H, W) or one number, shape (1, 1, 1, 1), or None; noise_strength: (C,), None without noise.
    bias: (C,) or None. style: (B, 2 C), the scales and then the shifts, or None for neither. If x holds one sample and
    style several, there is a result for each of them.
    Returns y in x's dtype and layout; mean and std (B, C) in float32 (float64 for float64), which is what everything is
    computed in. noise, noise_strength, bias and style may be of another floating dtype. Autocast changes nothing.
    Differentiable in all five, once by the kernels (see `kernels`). Where a channel is constant the deviation is 0, and
    its gradient is taken as 0.
    Raises ValueError for arguments of another kind.
    """
    _check(x, noise, noise_strength, bias, style)
    if kernels.selected(x):
        return fused_adain_act(x, noise, noise_strength, bias, style, eps, alpha)
    return adain_act_reference(x, noise, noise_strength, bias, style, eps=eps, alpha=alpha)


def _check(
    x: Tensor, noise: Tensor | None, noise_strength: Tensor | None, bias: Tensor | None, style: Tensor | None
) -> None:
    check_map(x)
    batch, channels, height, width = x.shape
    if height * width == 0:
        raise ValueError(f"x has shape {tuple(x.shape)}: a map without pixels has no statistics")
    if (noise is None) != (noise_strength is None):
        raise ValueError("noise and noise_strength come together: one of them is None")
    if noise is not None and noise.shape not in ((batch, 1, height, width), (1, 1, height, width), (1, 1, 1, 1)):
        raise ValueError(f"noise has shape {tuple(noise.shape)}, expected ({batch} or 1, 1, {height}, {width})")
    for name, value in (("noise_strength", noise_strength), ("bias", bias)):
        if value is not None and value.shape != (channels,):
            raise ValueError(f"{name} has shape {tuple(value.shape)}, expected ({channels},), one number a channel")
    if style is not None and (style.ndim != 2 or style.shape[1] != 2 * channels or batch not in (1, len(style))):
        raise ValueError(f"style has shape {tuple(style.shape)}, expected ({batch}, {2 * channels}), scales and shifts")


def adain_act_reference(
    x: Tensor,
    noise: Tensor | None = None,
    noise_strength: Tensor | None = None,
    bias: Tensor | None = None,
    style: Tensor | None = None,
    *,
    eps: float = EPS,
    alpha: float = ALPHA,
) -> tuple[Tensor, Tensor, Tensor]:
    """The formula of `adain_act` in plain PyTorch. Arguments are taken to be right."""
    with torch.autocast(x.device.type, enabled=False):
        h = wide(x)
        if noise is not None and noise_strength is not None:
            h = h + noise_strength.to(h)[:, None, None] * noise.to(h)
        if bias is not None:
            h = h + bias.to(h)[:, None, None]
        h, mean, std = standardised(functional.leaky_relu(h, alpha), eps)
        if style is not None:
            scale, shift = style.to(h)[:, :, None, None].chunk(2, dim=1)
            h = h * (1 + scale) + shift
        return finish(h, x), mean, std


def standardised(x: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Instance norm of x (B, C, H, W), and the mean and standard deviation (B, C) that it takes out.

    The deviation has no eps, as published; where it is zero (a channel that is constant in space) its gradient is taken
    as zero instead of nan. The statistics of a map that is not finite are not finite either.
    """
    mean = x.mean(dim=(2, 3), keepdim=True)
    centred = x - mean
    var = centred.square().mean(dim=(2, 3), keepdim=True)
    varies = var != 0
    std = torch.where(varies, torch.where(varies, var, 1.0).sqrt(), 0.0)
    return centred * torch.rsqrt(var + eps), mean.flatten(1), std.flatten(1)
