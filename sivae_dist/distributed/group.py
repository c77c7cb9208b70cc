"""The few collectives that training needs, with a group of one as the plain case."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True)
class Group:
    """The ranks that train together. With one rank every method is the identity and touches no process group.

    timeout_s: how long a collective may take, in every process group that is made of these ranks.
    """

    rank: int = 0
    ranks: int = 1
    timeout_s: float = 600.0

    @property
    def timeout(self) -> timedelta:
        """timeout_s as torch wants it. torch's own, where none is given, is 30 minutes (gloo) or 10 (NCCL)."""
        return timedelta(seconds=self.timeout_s)

    @property
    def is_main(self) -> bool:
        """Whether this rank writes logs and checkpoints."""
        return self.rank == 0

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sum over ranks, in place; returns the tensor."""
        if self.ranks > 1:
            dist.all_reduce(tensor)
        return tensor

    def max_(self, tensor: Tensor) -> Tensor:
        """Maximum over ranks, in place; returns the tensor."""
        if self.ranks > 1:
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return tensor

    def mean(self, per_sample: Tensor) -> Tensor:
        """Mean of a (B, ...) tensor over all samples of all ranks (B may differ by rank), detached, of shape (...)."""
        sums = per_sample.detach().sum(0)
        total = self.sum_(torch.cat([sums.reshape(-1), per_sample.new_tensor([float(len(per_sample))])]))
        return (total[:-1] / total[-1]).reshape(sums.shape)

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """This tensor from every rank, in rank order; the first dimension may differ by rank."""
        if self.ranks == 1:
            return [tensor]
        sizes = [torch.zeros(1, dtype=torch.int64, device=tensor.device) for _ in range(self.ranks)]
        dist.all_gather(sizes, torch.tensor([len(tensor)], device=tensor.device))
        longest = int(max(int(s) for s in sizes))
        padded = tensor.new_zeros(longest, *tensor.shape[1:])
        padded[: len(tensor)] = tensor
        parts = [torch.empty_like(padded) for _ in range(self.ranks)]
        dist.all_gather(parts, padded)
        return [part[: int(size)] for part, size in zip(parts, sizes, strict=True)]

    def texts(self, text: str) -> list[str]:
        """A short text from every rank, in rank order. For reports and consistency checks, not for the hot path."""
        encoded = torch.tensor(list(text.encode()), dtype=torch.uint8, device=self.device())
        return [bytes(part.cpu().tolist()).decode() for part in self.gather(encoded)]

    def broadcast_(self, module: nn.Module) -> None:
        """Overwrites parameters and buffers by those of rank 0."""
        if self.ranks > 1:
            for tensor in [*module.parameters(), *module.buffers()]:
                dist.broadcast(tensor.data, 0)

    def barrier(self) -> None:
        """Waits for every rank."""
        if self.ranks > 1:
            dist.barrier()

    def device(self) -> torch.device:
        """Where collectives of this backend want their tensors."""
        if self.ranks > 1 and dist.get_backend() == "nccl":
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("cpu")
