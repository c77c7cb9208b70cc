"""Modulated convolution: the style of a sample scales the inputs of a convolution that all samples share.

Karras et al., "Analyzing and Improving the Image Quality of StyleGAN", CVPR 2020, section 2.2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sivae_dist.ops._arguments import Pair, wide
from sivae_dist.ops.conv2d_resample import Fir, check_convolution, conv2d_resample_reference
from sivae_dist.ops.upfirdn2d import upfirdn2d, upfirdn2d_reference

EPS = 1e-8  # of the demodulation
SMALLEST = 1e-4  # a style or a filter is not brought to size one where that would blow it up further than this


def modulated_conv2d(
    x: Tensor,
    weight: Tensor,
    styles: Tensor,
    noise: Tensor | None = None,
    up: int = 1,
    down: int = 1,
    padding: Pair = 0,
    resample_filter: Tensor | None = None,
    demodulate: bool = True,
) -> Tensor:
    """Convolution with weights w'[b, o, i, k] = d[b, o] styles[b, i] weight[o, i, k], plus noise.

        d[b, o] = 1 / sqrt(sum over i, k of (styles[b, i] weight[o, i, k])^2 + 1e-8), or 1 without demodulation

    Demodulation gives every output channel unit variance if the inputs are independent with unit variance.

    x: (B, C, H, W), any floating dtype, contiguous or channels_last; B may be 0. weight: (O, C, height, width).
    styles: (B, C). noise: broadcasts to (B, 1, H', W'), added last, or None.
    up, down, padding, resample_filter: see `conv2d_resample`, which gives H' and W'.
    Returns (B, O, H', W') in x's dtype, or what autocast makes of it. weight, styles and noise may be of another
    floating dtype. Differentiable in x, weight, styles and noise. Raises ValueError for arguments of another kind.
    """
    check_convolution(x, weight, resample_filter, up, down)
    if styles.shape != x.shape[:2]:
        raise ValueError(f"styles have shape {tuple(styles.shape)}, expected {tuple(x.shape[:2])}, one number an input")
    if noise is not None and (noise.ndim != 4 or noise.shape[0] not in (1, x.shape[0]) or noise.shape[1] != 1):
        raise ValueError(f"noise has shape {tuple(noise.shape)}, expected ({x.shape[0]} or 1, 1, H', W')")
    return modulated_conv2d_reference(
        x, weight, styles, noise, up, down, padding, resample_filter, demodulate, fir=upfirdn2d
    )


def modulated_conv2d_reference(
    x: Tensor,
    weight: Tensor,
    styles: Tensor,
    noise: Tensor | None = None,
    up: int = 1,
    down: int = 1,
    padding: Pair = 0,
    resample_filter: Tensor | None = None,
    demodulate: bool = True,
    *,
    fir: Fir = upfirdn2d_reference,
) -> Tensor:
    """The same without a copy of the weights a sample. Arguments are taken to be right. fir: what filters.

    A convolution is linear in its input channels and d does not depend on space, so scaling inputs by the style before
    and outputs by d after one shared convolution gives the same map; see `factors`.
    """
    w, s, scale = factors(weight, styles, wide(x[:0]).dtype, demodulate=demodulate)
    y = conv2d_resample_reference(scale_channels(x, s), w.to(x.dtype), resample_filter, up, down, padding, fir=fir)
    with torch.autocast(x.device.type, enabled=False):
        return scale_and_add(y, scale[:, :, None, None], noise)


def factors(weight: Tensor, styles: Tensor, kind: torch.dtype, *, demodulate: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(weight / n, styles / m, m n d) in the dtype `kind`: for the convolution, before it (B, C), after it (B, O).

    Half precision: with m[b] = max |styles[b]| and n[o] = |weight[o]|, the convolution sees styles / m and weight / n,
    so its sums stay below sqrt(fan in) max |x| whatever the size of styles and weights, and the factor after it,

        m n d = 1 / sqrt(sum of (styles / m  weight / n)^2 + 1e-8 / (m n)^2)   (m n without demodulation),

    is computed in float32. m and n cancel, so they count as constants: values and gradients are those of the formula.
    """
    with torch.autocast(weight.device.type, enabled=False):
        w, s = weight.to(kind), styles.to(kind)
        n = w.detach().square().sum(dim=(1, 2, 3)).sqrt().clamp_min(SMALLEST)
        m = s.detach().abs().amax(dim=1, keepdim=True).clamp_min(SMALLEST)
        w, s = w / n[:, None, None, None], s / m
        scale = m * n
        if demodulate:
            scale = torch.rsqrt(s.square() @ w.square().sum(dim=(2, 3)).T + EPS / scale.square())
        return w, s, scale


def scale_channels(x: Tensor, s: Tensor) -> Tensor:
    """x (B, C, H, W) * s (B, C), in x's dtype."""
    with torch.autocast(x.device.type, enabled=False):
        return x * s.to(x.dtype)[:, :, None, None]


def scale_and_add(y: Tensor, scale: Tensor, noise: Tensor | None) -> Tensor:
    """y * scale + noise, broadcast, in float32 or wider, back in y's dtype."""
    scaled = wide(y) * scale.to(wide(y[:0]).dtype)
    return (scaled if noise is None else scaled + noise.to(scaled.dtype)).to(y.dtype)
