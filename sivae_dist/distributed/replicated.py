"""Strategy `ddp`: every rank holds both players whole, and each phase all-reduces the gradient of the trained one.

No DistributedDataParallel wrapper: a phase calls the trained network several times through the frozen one, which
needs either two step modules or find_unused_parameters there, and is silently wrong with static_graph. Adding up the
gradients after the backward needs no hooks and makes no assumption about the graph. The gradient is the SUM over ranks
of gradients of (local per-sample sums / global batch), so ranks may hold different numbers of samples, none included.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sivae_dist.distributed.group import Group

BUCKET_BYTES = 64 << 20  # few large collectives; one bucket for most networks here


@dataclass(frozen=True)
class Gradient:
    """What is known of a player's gradient once it is summed over ranks; scalar tensors, nothing read back.

    norm:  its norm before clipping, the same on all ranks. Non-finite exactly if some entry is, on any rank (or the
           norm overflows), so all ranks take the same decision from it.
    local: the norm (up to the order of sums) of this rank's part alone: tells which rank a non-finite entry is from.
    """

    norm: Tensor
    local: Tensor


class Replicated:
    """Both players whole on every rank. `players` and `optimizers` share their keys."""

    def __init__(
        self,
        players: dict[str, nn.Module],
        optimizers: dict[str, Optimizer],
        group: Group | None = None,
        *,
        clip_norm: float | None = None,
    ) -> None:
        self.players, self.optimizers, self.group = players, optimizers, group or Group()
        self.clip_norm = clip_norm
        self.bytes_reduced = 0  # gradient bytes handed to all-reduce since the start
        self.collectives = 0  # number of gradient collectives since the start
        for player in players.values():
            self.group.broadcast_(player)

    def train_only(self, names: Iterable[str]) -> None:
        """Freezes every player but `names`, and clears the gradients of those.

        A frozen player still passes gradients through; it only computes none for its own weights.
        """
        chosen = set(names)
        for name, player in self.players.items():
            for parameter in player.parameters():
                parameter.requires_grad_(name in chosen)
        for name in chosen:
            self.optimizers[name].zero_grad(set_to_none=True)

    def backward(self, loss: Tensor) -> None:
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
                self.bytes_reduced += flat.numel() * flat.element_size()
                self.collectives += 1
                offset = 0
                for gradient in bucket:
                    gradient.copy_(flat[offset : offset + gradient.numel()].view_as(gradient))
                    offset += gradient.numel()
        gradients = [p.grad for p in parameters if p.grad is not None]
        if scale != 1.0:
            torch._foreach_mul_(gradients, 1.0 / scale)
        norm: Tensor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
        if self.clip_norm is not None:
            torch._foreach_mul_(gradients, torch.clamp(self.clip_norm / (norm + 1e-6), max=1.0))
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

    def step(self, name: str) -> None:
        """One optimizer step of a player."""
        self.optimizers[name].step()


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
