"""Batch norm over the samples of all ranks, so that the number of ranks stays out of the mathematics.

torch.nn.SyncBatchNorm refuses CPU tensors, and per-rank statistics would make the gradient depend on how a batch is
split. This one works on any backend, with different numbers of samples a rank (none included), and its gradient equals
that of torch.nn.BatchNorm2d on the concatenated batch.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from sivae_dist.distributed.group import Group

M = TypeVar("M", bound=nn.Module)


class _Normalise(torch.autograd.Function):
    """y = (x - mean) / sqrt(var + eps) * weight + bias with statistics of all ranks. x: (B, C, ...)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, group: Group
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        dims = [0, *range(2, x.dim())]
        shape = [1, -1, *[1] * (x.dim() - 2)]
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        local = torch.cat([wide.sum(dims), wide.new_tensor([float(x.numel() // max(x.shape[1], 1))])])
        total = group.sum_(local)
        count = total[-1]
        mean = total[:-1] / count
        # A second pass over centred values: E[x^2] - E[x]^2 would cancel.
        var = group.sum_((wide - mean.view(shape)).square().sum(dims)) / count
        rstd = (var + eps).rsqrt()
        y = (wide - mean.view(shape)) * (rstd * weight).view(shape) + bias.view(shape)
        ctx.save_for_backward(x, weight, mean, rstd, count)
        ctx.group = group
        ctx.mark_non_differentiable(mean, var, count)
        return y.to(x.dtype), mean, var, count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor, *_: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        x, weight, mean, rstd, count = ctx.saved_tensors
        dims = [0, *range(2, x.dim())]
        shape = [1, -1, *[1] * (x.dim() - 2)]
        grad = grad_y.to(mean.dtype)
        x_hat = (x.to(mean.dtype) - mean.view(shape)) * rstd.view(shape)
        grad_bias = grad.sum(dims)
        grad_weight = (grad * x_hat).sum(dims)
        # The statistics depend on every rank's samples, so their gradient sums over ranks; weight and bias gradients
        # stay local here and are summed with all other gradients.
        sums = ctx.group.sum_(torch.stack([grad_bias, grad_weight])) / count
        grad_x = (grad - sums[0].view(shape) - x_hat * sums[1].view(shape)) * (rstd * weight).view(shape)
        return grad_x.to(x.dtype), grad_weight.to(weight.dtype), grad_bias.to(weight.dtype), None, None


class SynchronisedBatchNorm(_BatchNorm):
    """Drop-in for nn.BatchNorm1d/2d/3d (affine, with running statistics); same state-dict keys."""

    group: Group

    def _check_input_dim(self, x: Tensor) -> None:
        if x.dim() < 2:
            raise ValueError(f"expected (B, C, ...), got {tuple(x.shape)}")

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, ...) -> the same shape. In evaluation, running statistics as usual."""
        if not self.training:
            y: Tensor = super().forward(x)
            return y
        y, mean, var, count = _Normalise.apply(x, self.weight, self.bias, self.eps, self.group)  # type: ignore[no-untyped-call]
        if self.track_running_stats and self.running_mean is not None and self.running_var is not None:
            with torch.no_grad():
                if self.num_batches_tracked is not None:
                    self.num_batches_tracked.add_(1)
                unbiased = var * (count / (count - 1).clamp_min(1))
                for running, now in ((self.running_mean, mean), (self.running_var, unbiased)):
                    # A micro-batch may be empty on all ranks: it has no statistics, so they stay.
                    target = torch.where(count > 0, now.to(running.dtype), running)
                    running.lerp_(target, self.momentum or 0.0)
        return y


def synchronise_batch_norm(module: M, group: Group) -> M:
    """Replaces every batch norm in `module`, in place, sharing parameters and buffers; nothing to do on one rank."""
    if group.ranks == 1:
        return module
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, _BatchNorm) and not isinstance(child, SynchronisedBatchNorm):
                if not child.affine or child.running_mean is None or child.momentum is None:
                    raise TypeError(f"{name}: only affine batch norm with running averages can be synchronised")
                twin = SynchronisedBatchNorm(child.num_features, child.eps, child.momentum, device=child.weight.device)
                twin.weight, twin.bias = child.weight, child.bias
                twin.running_mean, twin.running_var = child.running_mean, child.running_var
                twin.num_batches_tracked = child.num_batches_tracked
                twin.group = group
                twin.train(child.training)
                setattr(parent, name, twin)
    return module
