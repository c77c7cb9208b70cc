"""The tail of a residual block in one go: batch or group norm, skip, LeakyReLU, and a change of size."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn
from torch.nn import functional

from sivae_dist.ops import kernels
from sivae_dist.ops._arguments import check_map
from sivae_dist.ops._fused_norm_act import fused_norm_act, serves

Resample = Literal["none", "down", "up"]
ALPHA = 0.2  # slope of the LeakyReLU below zero


def norm_act(
    x: Tensor,
    norm: nn.Module,
    skip: Tensor | None = None,
    *,
    skip_first: bool = False,
    alpha: float = ALPHA,
    resample: Resample = "none",
) -> Tensor:
    """leaky(norm(x) + skip), or leaky(norm(x + skip)) with skip_first, then the mean of 2 x 2 pixels or each one 2 x 2.

    leaky(v) is v above zero, alpha * v below.
    x: (B, C, H, W), any floating dtype, contiguous or channels_last; B may be 0 where the norm allows it.
    norm: the module; nn.BatchNorm2d and what derives from it (in training with the statistics of the batch, which move
    the running ones unless `track_running_stats` is off; with those of all ranks where it has a `group`), or
    nn.GroupNorm. Its hooks do not run where kernels do.
    skip: of x's shape, or None.
    resample: down, (B, C, H / 2, W / 2), an odd last row or column left out; up, (B, C, 2 H, 2 W); or none.
    Returns x's dtype, also under autocast, and its layout (the reference: torch's choice). The kernels compute in
    float32 (float64 for float64) and round once; the reference rounds after every step, as torch does.
    Differentiable in x, skip and the norm's parameters, once by the kernels (see `kernels`).
    Raises ValueError for arguments of another kind.
    """
    check_map(x)
    if skip is not None and (skip.shape != x.shape or not skip.is_floating_point()):
        raise ValueError(f"skip is {skip.dtype} of shape {tuple(skip.shape)}, expected floating, {tuple(x.shape)}")
    if resample not in ("none", "down", "up"):
        raise ValueError(f"resample is {resample!r}, expected none, down or up")
    if resample == "down" and min(x.shape[2:]) < 2:
        raise ValueError(f"x has shape {tuple(x.shape)}: there are no 2 x 2 pixels to average")
    if kernels.selected(x) and serves(norm, x):
        return fused_norm_act(x, norm, skip, skip_first=skip_first, alpha=alpha, resample=resample)
    return norm_act_reference(x, norm, skip, skip_first=skip_first, alpha=alpha, resample=resample)


def norm_act_reference(
    x: Tensor,
    norm: nn.Module,
    skip: Tensor | None = None,
    *,
    skip_first: bool = False,
    alpha: float = ALPHA,
    resample: Resample = "none",
) -> Tensor:
    """The formula of `norm_act` by torch's own operators. Arguments are taken to be right."""
    h: Tensor = norm(x if skip is None or not skip_first else x + skip)
    if skip is not None and not skip_first:
        h = h + skip
    # In place: norms and additions do not need their output in backward, so one map a layer is saved.
    h = functional.leaky_relu(h, alpha, inplace=True).to(x.dtype)
    if resample == "down":
        return functional.avg_pool2d(h, 2)
    return functional.interpolate(h, scale_factor=2, mode="nearest") if resample == "up" else h
