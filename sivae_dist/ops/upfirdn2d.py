"""Upsample, filter, downsample: resampling of feature maps and images with a finite impulse response (FIR).

The operator of the alias-aware resampling in StyleGAN2 (Karras et al., CVPR 2020, section 4 and appendix B).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from sivae_dist.ops import kernels
from sivae_dist.ops._arguments import Pair, check_filter, check_map, filter_size, finish, four, pair, wide
from sivae_dist.ops._fused_upfirdn2d import fused_upfirdn2d


def upfirdn2d(
    x: Tensor,
    f: Tensor | None,
    up: Pair = 1,
    down: Pair = 1,
    padding: Pair = 0,
    flip_filter: bool = False,
    gain: float = 1.0,
) -> Tensor:
    """Zeros in between, padding, FIR filter, every so-many-th pixel; all channels alike.

    With u the map in which up - 1 zeros follow every pixel of x, padded with zeros (negative padding crops),

        y[b, c, i, j] = gain * sum over m, n of g[m, n] * u[b, c, i * down_y + m, j * down_x + n]

    where g is f turned by 180 degrees (a convolution), or f itself with flip_filter (a correlation).

    x: (B, C, H, W), any floating dtype, contiguous or channels_last; B may be 0.
    f: (height, width), or (taps,) applied along both axes, with sqrt(gain) each, or None for a single 1.
    up, down: factor, or (x, y). padding: one number, (x, y), or (x_before, x_after, y_before, y_after); of u.
    Returns (B, C, H', W') in x's dtype and layout, H' = 1 + (H * up + pad_before + pad_after - height) // down.
    Sums are float32 (float64 for float64); taps times gain keep f's own dtype (float32 in a model).
    Differentiable in x (twice only by the reference, see `kernels`), not in f. Autocast changes nothing.
    Raises ValueError for arguments of another kind, or where nothing would be left of the map.
    """
    check_map(x)
    check_filter(f)
    up_x, up_y = pair(up, "up")
    down_x, down_y = pair(down, "down")
    left, right, top, bottom = sides = four(padding)
    width, height = filter_size(f)
    if x.shape[2] * up_y + top + bottom < height or x.shape[3] * up_x + left + right < width:
        raise ValueError(
            f"a filter of {height} x {width} taps does not fit into a map of {tuple(x.shape[2:])} with up {up} and "
            f"padding {padding}"
        )
    if kernels.selected(x):
        return fused_upfirdn2d(x, f, (up_x, up_y), (down_x, down_y), sides, flip_filter, gain)
    return upfirdn2d_reference(x, f, up, down, padding, flip_filter, gain)


def upfirdn2d_reference(
    x: Tensor,
    f: Tensor | None,
    up: Pair = 1,
    down: Pair = 1,
    padding: Pair = 0,
    flip_filter: bool = False,
    gain: float = 1.0,
) -> Tensor:
    """The formula of `upfirdn2d` in plain PyTorch, step by step. Arguments are taken to be right."""
    (up_x, up_y), (down_x, down_y) = pair(up, "up"), pair(down, "down")
    batch, channels, height, width = x.shape
    with torch.autocast(x.device.type, enabled=False):
        u = wide(x).reshape(batch, channels, height, 1, width, 1)
        u = functional.pad(u, (0, up_x - 1, 0, 0, 0, up_y - 1))
        u = functional.pad(u.reshape(batch, channels, height * up_y, width * up_x), four(padding))
        if f is None:
            y = u[:, :, ::down_y, ::down_x] * gain
        else:
            taps = f.detach().to(u)
            taps = taps if flip_filter else taps.flip(list(range(f.ndim)))
            if f.ndim == 2:
                y = _correlate(u, gain * taps, (down_y, down_x))
            else:  # the gain once, whatever its sign
                y = _correlate(_correlate(u, gain * taps[None, :], (1, down_x)), taps[:, None], (down_y, 1))
        return finish(y, x)


def _correlate(u: Tensor, taps: Tensor, stride: tuple[int, int]) -> Tensor:
    channels = u.shape[1]
    return functional.conv2d(u, taps.expand(channels, 1, *taps.shape), stride=stride, groups=channels)


def setup_filter(
    taps: Sequence[float] | Tensor | float | None,
    *,
    normalise: bool = True,
    flip: bool = False,
    gain: float = 1.0,
    separable: bool | None = None,
) -> Tensor:
    """Taps such as [1, 3, 3, 1] as the filter that the operators take, float32.

    None is a single 1, a number a single tap. One-dimensional taps become their outer product unless `separable`, which
    is the default from 8 taps on. normalise: divided by the sum, so that a constant passes unchanged. gain: of the map,
    so gain ** (dimensions / 2) for the array. Raises ValueError for an empty or higher-dimensional array, and for a
    negative gain of a separable one, which is applied twice.
    """
    f = torch.as_tensor(1.0 if taps is None else taps, dtype=torch.float32)
    if f.ndim > 2 or not f.numel():
        raise ValueError(f"taps of shape {tuple(f.shape)}, expected a number, (taps,) or (height, width)")
    f = f.reshape(1, 1) if f.ndim == 0 else f
    if separable is None:
        separable = f.ndim == 1 and f.numel() >= 8
    if f.ndim == 1 and not separable:
        f = torch.outer(f, f)
    if separable and f.ndim != 1:
        raise ValueError(f"taps of shape {tuple(f.shape)} cannot be separable, expected (taps,)")
    if separable and gain < 0:
        raise ValueError(f"gain {gain} of separable taps, expected one >= 0")
    f = f / f.sum() if normalise else f
    f = f.flip(list(range(f.ndim))) if flip else f
    return f * float(gain ** (f.ndim / 2))


def filter2d(x: Tensor, f: Tensor | None, padding: Pair = 0, flip_filter: bool = False, gain: float = 1.0) -> Tensor:
    """`upfirdn2d` that keeps the size: (B, C, H, W) -> the same, plus `padding`."""
    return _resized(x, f, (1, 1), (1, 1), padding, flip_filter, gain)


def upsample2d(
    x: Tensor, f: Tensor | None, up: Pair = 2, padding: Pair = 0, flip_filter: bool = False, gain: float = 1.0
) -> Tensor:
    """`upfirdn2d` that multiplies the size and keeps the mean: (B, C, H, W) -> (B, C, H up, W up), plus `padding`.

    The gain includes up_x up_y, which makes good for the zeros.
    """
    up_x, up_y = pair(up, "up")
    return _resized(x, f, (up_x, up_y), (1, 1), padding, flip_filter, gain * up_x * up_y)


def downsample2d(
    x: Tensor, f: Tensor | None, down: Pair = 2, padding: Pair = 0, flip_filter: bool = False, gain: float = 1.0
) -> Tensor:
    """`upfirdn2d` that divides the size (rounded down): (B, C, H, W) -> (B, C, H / down, W / down), plus `padding`."""
    return _resized(x, f, (1, 1), pair(down, "down"), padding, flip_filter, gain)


def _resized(
    x: Tensor,
    f: Tensor | None,
    up: tuple[int, int],
    down: tuple[int, int],
    padding: Pair,
    flip_filter: bool,
    gain: float,
) -> Tensor:
    sides = same_size(four(padding), filter_size(f), up, down)
    return upfirdn2d(x, f, up, down, sides, flip_filter, gain)


def same_size(
    padding: tuple[int, int, int, int], taps: tuple[int, int], up: tuple[int, int], down: tuple[int, int]
) -> tuple[int, int, int, int]:
    """Padding that gives size * up // down, half a filter on either side, plus the caller's own. All (x, y).

    Without resampling the odd pixel of an even filter stands before; otherwise the up - 1 zeros that follow each pixel,
    and the pixels that are dropped, are made good so that image centres stay where they are.
    """
    before, after = [], []
    for width, more, fewer in zip(taps, up, down, strict=True):
        first, last = 0, 0
        if more > 1:
            first, last = first + (width + more - 1) // 2, last + (width - more) // 2
        if fewer > 1:
            first, last = first + (width - fewer + 1) // 2, last + (width - fewer) // 2
        if more == fewer == 1:
            first, last = width // 2, (width - 1) // 2
        before.append(first)
        after.append(last)
    left, right, top, bottom = padding
    return left + before[0], right + after[0], top + before[1], bottom + after[1]
