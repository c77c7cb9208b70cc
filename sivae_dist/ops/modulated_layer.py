"""A whole layer of a modulated network: convolution, demodulation, noise, bias, LeakyReLU, in as few passes as can be.

The convolution is the library's. What comes after it, with the filter of a transposed one, is one pass over the map,
which can also write the map scaled for the layer that follows, so that this one need not read it once more.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sivae_dist.ops import kernels
from sivae_dist.ops._arguments import filter_size, wide
from sivae_dist.ops._fused_modulated import fused_epilogue
from sivae_dist.ops._fused_modulated_fir import fused_fir_epilogue, serves_filter
from sivae_dist.ops.bias_act import bias_act_reference
from sivae_dist.ops.conv2d_resample import check_convolution, conv2d_resample_reference, transposed_convolution
from sivae_dist.ops.modulated_conv2d import factors, scale_and_add, scale_channels
from sivae_dist.ops.upfirdn2d import upfirdn2d

ALPHA, GAIN = 0.2, math.sqrt(2.0)  # of the LeakyReLU


def modulated_layer(
    x: Tensor,
    weight: Tensor,
    styles: Tensor,
    bias: Tensor | None = None,
    noise: Tensor | None = None,
    noise_strength: Tensor | None = None,
    *,
    up: int = 1,
    padding: int = 0,
    resample_filter: Tensor | None = None,
    clamp: float | None = None,
    scaled: bool = False,
    next_styles: Tensor | None = None,
    plain: bool = True,
) -> tuple[Tensor | None, Tensor | None]:
    """y = bias_act(modulated_conv2d(x, ...), bias, noise, noise_strength), and y scaled for the next layer.

    x, weight, styles, up, padding, resample_filter: see `modulated_conv2d`; with demodulation. bias, noise,
    noise_strength, clamp: see `bias_act`, of the LeakyReLU.
    scaled: x comes out of this function with these styles as `next_styles`.
    next_styles: (B, O), the styles of the next modulated layer, or None. plain: whether y itself is wanted, too.
    Returns (y or None, scaled map or None), (B, O, H', W') in the dtype of the convolution. Differentiable in all
    tensors but the filter, once by the kernels (see `kernels`). Raises ValueError for arguments of another kind.
    """
    check_convolution(x, weight, resample_filter, up, 1)
    if styles.shape != x.shape[:2]:
        raise ValueError(f"styles have shape {tuple(styles.shape)}, expected {tuple(x.shape[:2])}, one number an input")
    if next_styles is not None and next_styles.shape != (len(x), len(weight)):
        raise ValueError(f"next_styles have shape {tuple(next_styles.shape)}, expected {(len(x), len(weight))}")
    if next_styles is None and not plain:
        raise ValueError("neither the map nor a scaled one is wanted")
    if (noise is None) != (noise_strength is None):
        raise ValueError("noise and noise_strength come together: one of them is None")
    w, s, scale = factors(weight, styles, wide(x[:0]).dtype, demodulate=True)
    x, w = x if scaled else scale_channels(x, s), w.to(x.dtype)
    following = None if next_styles is None else following_factor(next_styles)
    sides = None
    if up > 1:
        y, sides = transposed_convolution(x, w, resample_filter, up, 1, padding)
        size = _filtered_size(y, sides, filter_size(resample_filter))
    else:
        y = conv2d_resample_reference(x, w, None, 1, 1, padding)
        size = (y.shape[2], y.shape[3])
    if noise is not None and (noise.shape[1:] != (1, *size) or noise.shape[0] not in (1, len(y))):
        raise ValueError(f"noise has shape {tuple(noise.shape)}, expected ({len(y)} or 1, 1, {size[0]}, {size[1]})")
    if sides is not None:
        gain = float(up * up)
        if kernels.selected(y) and serves_filter(resample_filter, sides):
            assert resample_filter is not None
            how = (resample_filter, sides, False, gain)
            return fused_fir_epilogue(y, *how, scale, noise, noise_strength, bias, following, ALPHA, GAIN, clamp, plain)
        y = upfirdn2d(y, resample_filter, 1, 1, sides, gain=gain)
    if kernels.selected(y):
        return fused_epilogue(y, scale, noise, noise_strength, bias, following, ALPHA, GAIN, clamp, plain)
    return epilogue_reference(y, scale, noise, noise_strength, bias, following, clamp, plain=plain)


def _filtered_size(y: Tensor, sides: tuple[int, int, int, int], taps: tuple[int, int]) -> tuple[int, int]:
    """(height, width) of y filtered with this padding. taps: (width, height)."""
    return y.shape[2] + sides[2] + sides[3] - taps[1] + 1, y.shape[3] + sides[0] + sides[1] - taps[0] + 1


def following_factor(styles: Tensor) -> Tensor:
    """What a layer with these styles multiplies its input by, (B, C): the second of `factors`."""
    none = styles.new_zeros(1, styles.shape[1], 1, 1)
    return factors(none, styles, wide(styles[:0]).dtype, demodulate=False)[1]


def epilogue_reference(
    y: Tensor,
    scale: Tensor,
    noise: Tensor | None,
    noise_strength: Tensor | None,
    bias: Tensor | None,
    following: Tensor | None,
    clamp: float | None,
    *,
    plain: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """What comes after the convolution, step by step. scale: (B, O); following: (B, O) or None."""
    with torch.autocast(y.device.type, enabled=False):
        y = scale_and_add(y, scale[:, :, None, None], None)
    y = bias_act_reference(y, bias, noise, noise_strength, "lrelu", ALPHA, GAIN, clamp)
    return y if plain else None, None if following is None else scale_channels(y, following)
