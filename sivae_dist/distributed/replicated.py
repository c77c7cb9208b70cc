"""Strategy `ddp`: every rank holds both players whole, and each phase all-reduces the gradient of the trained one.

No DistributedDataParallel wrapper: a phase calls the trained network several times through the frozen one, which
needs either two step modules or find_unused_parameters there, and is silently wrong with static_graph. Adding up the
gradients after the backward needs no hooks and makes no assumption about the graph. The gradient is the SUM over ranks
of gradients of (local per-sample sums / global batch), so ranks may hold different numbers of samples, none included.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sivae_dist.distributed.group import Group
from sivae_dist.distributed.launch import DistributedConfig
from sivae_dist.distributed.strategy import Gradient, Strategy

BUCKET_BYTES = 64 << 20  # few large collectives; one bucket for most networks here


class Replicated(Strategy):
    """Both players whole on every rank."""

    name = "ddp"

    def backward(self, loss: Tensor, *, last: bool = True) -> None:
        """Accumulates gradients of a scalar."""
        loss.backward()  # type: ignore[no-untyped-call]

    def reduce(self, name: str, *, scale: float = 1.0) -> Gradient:
        """Sums the player's gradients over ranks, divides them by `scale` (what the loss was multiplied by), clips."""
        parameters = list(self.players[name].parameters())
        parts: list[Tensor] = []
        if self.group.ranks > 1:
            self._fill(parameters)
            for bucket in _buckets([p.grad for p in parameters if p.grad is not None]):
                flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
                parts.append(torch.linalg.vector_norm(flat))
                self.group.sum_(flat)
                self.traffic.add(flat.nbytes)
                offset = 0
                for gradient in bucket:
                    gradient.copy_(flat[offset : offset + gradient.numel()].view_as(gradient))
                    offset += gradient.numel()
        gradients = [p.grad for p in parameters if p.grad is not None]
        if scale != 1.0:
            torch._foreach_mul_(gradients, 1.0 / scale)
        norm: Tensor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
        self._clip(gradients, norm)
        return Gradient(norm, torch.linalg.vector_norm(torch.stack(parts)) if parts else norm)

    def _fill(self, parameters: list[nn.Parameter]) -> None:
        """Gives zeros to those without a gradient here but with one on another rank: all ranks add up the same tensors.

        Those that no rank has used (levels of a growing network) stay without: optimizers leave such parameters alone,
        on several ranks as on one. The answer is read from the device only where some are missing.
        """
        used = torch.tensor([float(p.grad is not None) for p in parameters], device=parameters[0].device)
        self.group.sum_(used)
        if all(parameter.grad is not None for parameter in parameters):
            return
        for parameter, ranks in zip(parameters, used.tolist(), strict=True):
            if parameter.grad is None and ranks > 0:
                parameter.grad = torch.zeros_like(parameter)


def _buckets(gradients: list[Tensor]) -> list[list[Tensor]]:
    """Consecutive gradients of one dtype, up to BUCKET_BYTES each (a larger tensor is a bucket of its own)."""
    buckets: list[list[Tensor]] = []
    size = 0
    for gradient in gradients:
        nbytes = gradient.numel() * gradient.element_size()
        if not buckets or size + nbytes > BUCKET_BYTES or buckets[-1][0].dtype != gradient.dtype:
            buckets.append([])
            size = 0
        buckets[-1].append(gradient)
        size += nbytes
    return buckets


def build(
    config: DistributedConfig,
    players: dict[str, nn.Module],
    optimizers: dict[str, Optimizer],
    group: Group,
    *,
    clip_norm: float | None = None,
) -> Replicated:
    """The strategy as configured."""
    return Replicated(players, optimizers, group, clip_norm=clip_norm)
