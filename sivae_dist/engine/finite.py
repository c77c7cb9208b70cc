"""Is everything finite? Asked once a phase, before the step, with one answer for all ranks and one read by the host."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sivae_dist.distributed.group import Group
from sivae_dist.distributed.strategy import Gradient


@dataclass
class Skip:
    """A phase that was not finite. The same on all ranks.

    phase:    its name.
    culprits: one text a rank, naming what was non-finite there; empty where everything was finite.
    count:    how many terms and gradients were non-finite, over all ranks.
    players:  players whose gradient was non-finite (each, or their sum over ranks).
    forward:  whether a term or the data were non-finite, so that scaling the loss differently cannot help.
    overflow: set when it is an overflow of the fp16 loss scale, which is part of the normal course of things.
    """

    phase: str
    culprits: list[str]
    count: int
    players: set[str]
    forward: bool
    overflow: bool = False

    def text(self) -> str:
        """`rank 1: encoder/rec, gradient of the encoder; rank 3: ...`."""
        named = [f"rank {rank}: {text}" for rank, text in enumerate(self.culprits) if text]
        return "; ".join(named) or f"the sum over ranks of the gradient of the {' and the '.join(sorted(self.players))}"


def examine(
    phase: str,
    x: Tensor,
    sums: Mapping[str, Tensor],
    gradients: Mapping[str, Gradient],
    group: Group,
    buffers: Buffers | None = None,
) -> Skip | None:
    """None if data, terms, gradients and buffers are finite on every rank. Collective.

    x: this rank's data; sums: term -> its sum on this rank; gradients: player -> its gradient after the reduction.
    buffers: the model's, which its forward passes have moved (batch-norm statistics, averages of styles).
    With synchronised batch norm a NaN reaches all ranks within the forward pass: then every rank is named, and `data`
    tells where it came from, if it came with the data.
    """
    norm = buffers.norm() if buffers is not None else None
    moved = {} if norm is None else {"running statistics": norm}
    names = ["data", *(f"{phase}/{term}" for term in sums), *moved]
    forward = len(names)
    names += [f"gradient of the {player}" for player in gradients]
    local = [x.sum(), *sums.values(), *moved.values(), *(gradient.local for gradient in gradients.values())]
    own = torch.stack([~value.isfinite() for value in local]).float()
    counts = group.sum_(own.clone())
    summed = torch.stack([~gradient.norm.isfinite() for gradient in gradients.values()]).float()
    answer = torch.cat([counts, summed]).tolist()  # the one read
    if not any(answer):
        return None
    culprits = group.texts(", ".join(name for name, bad in zip(names, own.tolist(), strict=True) if bad))
    bad = [player for player, flag in zip(gradients, answer[len(names) :], strict=True) if flag]
    count = max(int(sum(answer[: len(names)])), len(bad))
    return Skip(phase, culprits, count, set(bad), forward=any(answer[:forward]))


class Buffers:
    """A second copy of a module's buffers (batch-norm statistics): what a skipped phase moved is put back."""

    def __init__(self, module: nn.Module) -> None:
        self._live = [buffer for buffer in module.buffers() if buffer.numel()]
        self._floating = [buffer for buffer in self._live if buffer.is_floating_point()]
        self._kept = [buffer.detach().clone() for buffer in self._live]

    @torch.no_grad()
    def save(self) -> None:
        """Keeps the present values."""
        if self._live:
            torch._foreach_copy_(self._kept, self._live)

    @torch.no_grad()
    def restore(self) -> None:
        """Puts the kept values back."""
        if self._live:
            torch._foreach_copy_(self._live, self._kept)

    @torch.no_grad()
    def norm(self) -> Tensor | None:
        """The norm of all of them together, on the device: non-finite if some entry is. None where there are none."""
        if not self._floating:
            return None
        norm: Tensor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(self._floating)))
        return norm
