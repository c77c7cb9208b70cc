"""Decoding once what two phases of an iteration need: `train.decode_once`.

The encoder phase and the decoder phase of an introspective objective decode the same latents with the same weights, for
the decoder does not move in between. An objective says which (`Phase.decoded_again`). With this on, such a latent is
decoded in the encoder phase with a graph that reaches the decoder's weights, and the decoder phase gets that image and
graph instead of decoding again: two of a decoder's forward passes an iteration less, for the memory that one more graph
takes until the decoder phase ends.

    encoder phase:  z -> [tap] -> x      the gradient of x goes back to z through the kept graph, which stays
    decoder phase:       kept x          its gradient goes on through the kept graph to the decoder's weights

The plain way (off) is the reference: values, losses and gradients are the same bit for bit on a device that repeats its
sums (where an objective decodes only one of its two latents again, two parts of a gradient are added in another order).
Running averages move in both phases either way; the second movement is computed from the first, up to rounding.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sivae_dist.models import running_averages
from sivae_dist.objectives import Phase, Players


@dataclass
class _Kept:
    """z, what the decoder made of it with its graph, and how the running averages moved meanwhile."""

    z: Tensor
    image: Tensor
    moved: _Movement


class Decoded:
    """What one micro-batch's phases have decoded and need again. One object an iteration and micro-batch."""

    def __init__(self, decoder: nn.Module) -> None:
        self.module = decoder
        self._kept: dict[str, _Kept] = {}

    def players(self, players: Players, phase: Phase) -> Players:
        """The same players, with a decoder that keeps what this phase names and gives what an earlier one kept."""
        decode = players.decoder

        def decoder(z: Tensor, name: str = "", *, from_prior: bool = False) -> Tensor:
            if name in phase.decoded_again:
                return self._keep(decode, z, name, from_prior=from_prior)
            kept = self._kept.pop(name, None)
            if kept is None or not _same(kept.z, z):
                return decode(z, name, from_prior=from_prior)
            kept.moved.repeat()
            return kept.image

        return replace(players, decoder=decoder)

    def _keep(self, decode: Any, z: Tensor, name: str, *, from_prior: bool) -> Tensor:
        leaf = z.detach().requires_grad_(z.requires_grad)
        moved = _Movement(self.module)
        with _trainable(self.module):
            image = decode(leaf, name, from_prior=from_prior)
        moved.end()
        self._kept[name] = _Kept(leaf, image, moved)
        if not z.requires_grad:
            return image.detach()  # type: ignore[no-any-return]
        tapped: Tensor = _Tap.apply(z, (leaf, image, self.module))  # type: ignore[no-untyped-call]
        return tapped


class _Tap(torch.autograd.Function):
    """z -> the image that was decoded of it, kept with its own graph, which the backward pass runs through but keeps.

    Only the gradient of z is computed, none of the decoder's weights.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, kept: tuple[Tensor, Tensor, nn.Module]) -> Tensor:
        ctx.kept = kept
        return kept[1].detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        leaf, image, decoder = ctx.kept
        with _trainable(decoder):  # blocks that are recomputed must do what they did
            (of_z,) = torch.autograd.grad(image, leaf, grad, retain_graph=True)
        return of_z, None


class _Movement:
    """How the running averages of a decoder moved between creation and `end`, to be done once more.

    Each became keep * old + step, for a constant `keep`; or it stayed, where a part of the batch without any images
    left it alone, which is so the second time, too.
    """

    def __init__(self, decoder: nn.Module) -> None:
        self.decoder = decoder
        # Neither read nor written through their version counters, by which autograd sees changes: as batch norm does.
        self._before = [(average, average.data.clone(), keep) for average, keep in running_averages(decoder)]
        self._step: dict[int, tuple[Tensor, Tensor]] = {}

    @torch.no_grad()
    def end(self) -> None:
        """To be called once the decoder has run."""
        self._step = {
            id(average): (average.data - keep * before, (average.data != before).any())
            for average, before, keep in self._before
        }

    @torch.no_grad()
    def repeat(self) -> None:
        """Moves those that a forward pass would move now by the same step once more."""
        for average, keep in running_averages(self.decoder):
            step, moved = self._step[id(average)]
            average.data.copy_(torch.where(moved, average.data * keep + step, average.data))


@contextmanager
def _trainable(module: nn.Module) -> Iterator[None]:
    """Within, all parameters take part in graphs, as they do in a phase that trains them."""
    frozen = [parameter for parameter in module.parameters() if not parameter.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are the same memory, unchanged."""
    return (
        one.untyped_storage()._cdata == other.untyped_storage()._cdata
        and one.storage_offset() == other.storage_offset()
        and one.shape == other.shape
        and one.stride() == other.stride()
        and one._version == other._version
    )
