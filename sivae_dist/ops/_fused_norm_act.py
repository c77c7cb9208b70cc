"""`torch.ops.sivae.norm_act_*`: the kernels in `kernels/norm_act`, and how they make up a norm with its derivative.

The kernels measure and write maps, with constants for a channel (C,) or for a channel of a sample (B, C). What lies
between, batch or group or all ranks, has B C numbers at most and is done here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from sivae_dist.ops import _library
from sivae_dist.ops._arguments import layout

Sum = Callable[[Tensor], Tensor]  # over ranks
RESAMPLE = {"none": 0, "down": 1, "up": 2}

_MAPS = "Tensor x, Tensor? skip, Tensor mean, Tensor scale, Tensor shift"
_HOW = "bool first, int resample, float alpha"


def serves(norm: nn.Module, x: Tensor) -> bool:
    """Whether the kernels know this norm for this map."""
    # What a norm refuses (a batch without variance, other sizes), it should say itself.
    if isinstance(norm, nn.GroupNorm):
        return norm.num_channels == x.shape[1] and x.numel() > 0
    if not isinstance(norm, _BatchNorm) or norm.num_features != x.shape[1]:
        return False
    return not norm.training or hasattr(norm, "group") or x.numel() > x.shape[1]


def fused_norm_act(
    x: Tensor, norm: nn.Module, skip: Tensor | None, *, skip_first: bool, alpha: float, resample: str
) -> Tensor:
    """As `norm_act` with arguments taken to be right, by the kernels of x's device, for a norm that they serve."""
    wide = _library.wide_dtype(x)
    weight = torch.ones(x.shape[1], dtype=wide, device=x.device) if norm.weight is None else norm.weight.to(wide)
    bias = torch.zeros_like(weight) if norm.bias is None else norm.bias.to(wide)
    if skip is not None:
        skip = skip.to(x.dtype).contiguous(memory_format=layout(x))
    how = (skip_first, RESAMPLE[resample], alpha)
    if isinstance(norm, nn.GroupNorm):
        return _run(x, skip, weight, bias, None, None, norm.num_groups, norm.eps, None, how)[0]
    assert isinstance(norm, _BatchNorm)
    if not norm.training and norm.running_mean is not None and norm.running_var is not None:
        given = norm.running_mean.to(wide), norm.running_var.to(wide)
        return _run(x, skip, weight, bias, *given, 0, norm.eps, None, how)[0]
    group = getattr(norm, "group", None) if norm.training else None
    total: Sum | None = None if group is None else group.sum_
    y, mean, var, count = _run(x, skip, weight, bias, None, None, 0, norm.eps, total, how)
    if norm.training and norm.track_running_stats:
        _move(norm, mean, var, count)
    return y


def _run(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    results: tuple[Tensor, Tensor, Tensor, Tensor] = _NormAct.apply(*arguments)  # type: ignore[no-untyped-call]
    return results


@torch.no_grad()
def _move(norm: _BatchNorm, mean: Tensor, var: Tensor, count: Tensor) -> None:
    """The running statistics, as torch.nn.BatchNorm2d moves them; the variance without bias."""
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
    if norm.running_mean is None or norm.running_var is None:
        return
    unbiased = var * (count / (count - 1).clamp_min(1))
    for running, new in ((norm.running_mean, mean), (norm.running_var, unbiased)):
        now = torch.where(count > 0, new, running)  # an empty micro-batch has no statistics
        if norm.momentum is None:
            assert norm.num_batches_tracked is not None
            running.add_((now.to(running.dtype) - running) / norm.num_batches_tracked)
        else:
            running.lerp_(now.to(running.dtype), norm.momentum)


class _NormAct(torch.autograd.Function):
    """(y, mean, var, count); the last three for the running statistics, without a derivative.

    mean, var: given statistics (C,), or None for those of x (+ skip). groups: of a group norm, 0 for a batch norm.
    total: sums over ranks, None for one rank alone.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        skip: Tensor | None,
        weight: Tensor,
        bias: Tensor,
        mean: Tensor | None,
        var: Tensor | None,
        groups: int,
        eps: float,
        total: Sum | None,
        how: tuple[bool, int, float],
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        ops = _operators()
        batch, channels = x.shape[:2]
        space = x.shape[2] * x.shape[3]
        ctx.measured = mean is None or var is None
        count = weight.new_full((), float(batch * space))
        if mean is None or var is None:
            means, squares = ops.norm_act_moments(x, skip if how[0] else None)
            if groups:
                size = channels // groups
                means, squares = means.reshape(batch, groups, size), squares.reshape(batch, groups, size)
                mean, count = means.mean(dim=2), weight.new_full((), float(size * space))
                var = (squares.sum(dim=2) + space * (means - mean[:, :, None]).square().sum(dim=2)) / count
            elif total is None:
                mean = means.mean(dim=0)
                var = (squares.sum(dim=0) + space * (means - mean).square().sum(dim=0)) / count
            else:
                summed = total(torch.cat([means.sum(dim=0) * space, count[None]]))
                count = summed[-1]
                mean = summed[:-1] / count
                var = total(squares.sum(dim=0) + space * (means - mean).square().sum(dim=0)) / count
        rstd = torch.rsqrt(var + eps)
        if groups:
            centre, inverse = (t.repeat_interleave(channels // groups, dim=1) for t in (mean, rstd))
            scale, shift = inverse * weight, bias.expand(batch, -1).contiguous()
        else:
            centre, inverse, scale, shift = mean, rstd, rstd * weight, bias
        centre, shift = centre.contiguous(), shift.contiguous()
        y = ops.norm_act_apply(x, skip, centre, scale, shift, *how)
        ctx.save_for_backward(x, skip, weight, centre, inverse, scale, shift, count)
        ctx.groups, ctx.total, ctx.how = groups, total, how
        ctx.layout = layout(x)
        if not ctx.measured:  # an input must not be an output as well
            mean, var = count.clone(), count.clone()
        ctx.mark_non_differentiable(mean, var, count)
        ctx.set_materialize_grads(False)
        return y, mean, var, count

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        if gradient is None:
            return (None,) * 10
        ops = _operators()
        x, skip, weight, centre, inverse, scale, shift, count = ctx.saved_tensors
        first = ctx.how[0]
        gradient = gradient.contiguous(memory_format=ctx.layout)
        maps = (gradient, x, skip, centre, scale, shift)
        sums, moments = ops.norm_act_sums(*maps, *ctx.how)
        grad_bias, grad_weight = sums.sum(dim=0), (moments * inverse).sum(dim=0)
        if not ctx.measured:
            level = by_u = torch.zeros_like(scale)
        elif ctx.groups:
            size = x.shape[1] // ctx.groups

            def over_group(t: Tensor) -> Tensor:
                weighted: Tensor = t * weight
                return weighted.reshape(len(x), ctx.groups, size).sum(dim=2).repeat_interleave(size, dim=1)

            level = -inverse * over_group(sums) / count
            by_u = -inverse.pow(3) * over_group(moments) / count
        else:
            both = torch.stack([grad_bias, grad_weight])
            if ctx.total is not None:  # the statistics depend on every rank's samples
                both = ctx.total(both)
            level, by_u = -scale * both[0] / count, -scale * inverse * both[1] / count
        want_skip = skip is not None and not first
        dx, dskip = ops.norm_act_gradients(*maps, level.contiguous(), by_u.contiguous(), *ctx.how, want_skip)
        if skip is None:
            dskip = None
        elif first:
            dskip = dx
        return dx, dskip, grad_weight, grad_bias, None, None, None, None, None, None


def _operators() -> Any:
    return torch.ops.sivae


def _like(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=layout(x))


def _two(x: Tensor) -> tuple[Tensor, Tensor]:
    one, two = (x.new_empty(x.shape[:2], dtype=_library.wide_dtype(x)) for _ in range(2))
    return one, two


def _moments_fake(x: Tensor, skip: Tensor | None) -> tuple[Tensor, Tensor]:
    return _two(x)


def _apply_fake(
    x: Tensor, skip: Tensor | None, mean: Tensor, scale: Tensor, shift: Tensor, first: bool, resample: int, alpha: float
) -> Tensor:
    height, width = x.shape[2:]
    if resample:
        height, width = (height // 2, width // 2) if resample == RESAMPLE["down"] else (2 * height, 2 * width)
    return torch.empty((*x.shape[:2], height, width), dtype=x.dtype, device=x.device, memory_format=layout(x))


def _sums_fake(gradient: Tensor, x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _two(x)


def _gradients_fake(gradient: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return _like(x), _like(x) if rest[-1] else x.new_empty(0, 1, 1, 1)


_library.define("norm_act_moments", "(Tensor x, Tensor? skip) -> (Tensor, Tensor)", _moments_fake)
_library.define("norm_act_apply", f"({_MAPS}, {_HOW}) -> Tensor", _apply_fake)
_library.define("norm_act_sums", f"(Tensor gradient, {_MAPS}, {_HOW}) -> (Tensor, Tensor)", _sums_fake)
_library.define(
    "norm_act_gradients",
    f"(Tensor gradient, {_MAPS}, Tensor level, Tensor by_u, {_HOW}, bool want_skip) -> (Tensor, Tensor)",
    _gradients_fake,
)
for _name in ("moments", "apply", "sums", "gradients"):
    _library.no_derivative(f"norm_act_{_name}")
