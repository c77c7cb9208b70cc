"""One iteration of two-player training: every phase of the objective, in order, each with its own optimizer step.

    for each phase (player trained, players frozen):
        for each micro-batch: terms = objective(players, x, draws, carry);  backward(sum(loss) / global batch)
        sum gradients over ranks -> all finite, on every rank? -> step

All micro-batches of one phase come before the next phase: the decoder must see the encoder after its step. A phase with
a non-finite number is skipped on all ranks: buffers go back to where they were before it, its terms are not reported,
and the phases after it, which would work on what it carried over, are skipped too. Phases before it stand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from sivae_dist import counters
from sivae_dist.data import Batch
from sivae_dist.distributed.strategy import Strategy
from sivae_dist.engine.decoded import Decoded
from sivae_dist.engine.draws import PositionDraws
from sivae_dist.engine.finite import Buffers, Skip, examine
from sivae_dist.engine.loss_scale import LossScales
from sivae_dist.engine.precision import Drawing, Precision
from sivae_dist.engine.tally import Tally, add_shares
from sivae_dist.errors import UserError
from sivae_dist.models import Autoencoder, DecoderDraws
from sivae_dist.objectives import Draws, Objective, Phase, Terms

Noise = Callable[[str], Tensor]
Observer = Callable[[Phase, Terms], None]
Drawn = Callable[[str, Tensor, Tensor], None]
Split = Callable[
    [Batch, int, int, int], list[Batch]
]  # batch, number of parts, its first image, its images on all ranks


@dataclass
class IterationReport:
    """What an iteration leaves for reports; tensors stay on the device until someone looks.

    sums:      (phase, term) -> sum of the per-sample term over this rank's samples (scalar tensor)
    grad_norm: player -> norm of the summed gradient before clipping (scalar tensor)
    shares:    tag -> (this rank's sum, what the sum over ranks is divided by): fractions that `guard/...` tags report
    skip:      what was not finite, the same on all ranks; None after a whole iteration

    Of a skipped phase nothing enters sums, norms and shares.
    """

    sums: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    grad_norm: dict[str, Tensor] = field(default_factory=dict)
    shares: dict[str, tuple[Tensor, int]] = field(default_factory=dict)
    skip: Skip | None = None


class Iteration:
    """Runs iterations of an objective on a model whose players a strategy trains.

    seed and salt key the noise; the salt changes when a run has been rolled back. accumulation splits the global batch
    into that many micro-batches (batch-norm statistics are then those of a micro-batch over all ranks).
    decode_once: see `decoded`. Raises UserError for a strategy that cannot.
    """

    def __init__(
        self,
        model: Autoencoder,
        objective: Objective,
        strategy: Strategy,
        *,
        seed: int = 0,
        accumulation: int = 1,
        precision: Precision | None = None,
        scales: LossScales | None = None,
        salt: int = 0,
        decode_once: bool = False,
    ) -> None:
        self.model, self.objective, self.strategy = model, objective, strategy
        self.seed, self.salt, self.accumulation = seed, salt, accumulation
        self.precision, self.scales = precision or Precision(), scales or LossScales()
        self.decode_once = decode_once
        if decode_once and not strategy.keeps_graphs:
            raise UserError(
                f"train.decode_once is True, but distributed.strategy {strategy.name} keeps no graph between phases",
                "set train.decode_once to False, or the strategy to ddp",
            )
        self.buffers = Buffers(model)
        self.split: Split = by_place
        self.drawn: Drawn | None = None  # is told every draw of noise: name, positions (B,), value (B, ...)

    def __call__(
        self,
        batch: Batch,
        *,
        nimg: int,
        global_batch: int,
        noise: Noise | None = None,
        drawing: Drawing | None = None,
        observe: Observer | None = None,
    ) -> IterationReport:
        """One iteration on this rank's `batch` of a global batch that begins at image number `nimg`.

        noise:   replaces the position-keyed draws (tests feed recorded ones).
        drawing: replaces those that a stochastic decoder makes.
        observe: called after the backward passes of a phase and before its optimizer steps.
        """
        self.model.train()
        report = IterationReport()
        micro_batches = self.split(batch, self.accumulation, nimg, global_batch)
        carries: list[dict[str, Tensor]] = [{} for _ in micro_batches]
        kept = [Decoded(self.model.decoder) if self.decode_once else None for _ in micro_batches]
        for phase in self.objective.phases(nimg):
            self.strategy.train_only(phase.trains)
            self.buffers.save()
            tally, scale = Tally(), self.scales.of(phase.trains)
            with statistics_only_of(self.model, phase.statistics):
                for number, (micro, carry, again) in enumerate(zip(micro_batches, carries, kept, strict=True), start=1):
                    draws = drawing or self._drawing(micro, nimg)
                    terms = self._terms(phase, micro, carry, again, noise, draws, tally)
                    last = number == len(micro_batches)
                    self.strategy.backward(terms.loss.sum() / global_batch * scale, last=last)
                    carry.update(terms.carry)
                    tally.add(terms)
            gradients = {player: self.strategy.reduce(player, scale=scale) for player in phase.trains}
            if observe is not None:
                observe(phase, terms)
            report.skip = examine(phase.name, batch.x, tally.sums, gradients, self.strategy.group, self.buffers)
            self.scales.update(phase.trains, report.skip)
            if report.skip is not None:
                self.buffers.restore()
                break
            for player in phase.trains:
                self.strategy.step(player)
            report.sums |= {(phase.name, term): total for term, total in tally.sums.items()}
            report.grad_norm |= {player: gradient.norm for player, gradient in gradients.items()}
            add_shares(report.shares, tally.shares(global_batch, len(micro_batches)))
        self.strategy.traffic.steps += 1
        return report

    def _terms(
        self,
        phase: Phase,
        micro: Batch,
        carry: dict[str, Tensor],
        kept: Decoded | None,
        noise: Noise | None,
        drawing: Drawing,
        tally: Tally,
    ) -> Terms:
        condition = one_hot(micro.label, self.model.condition_dim, micro.x)
        players = self.precision.players(self.model, condition, tally.watch, drawing=drawing)
        if kept is not None:
            players = kept.players(players, phase)
        draws = Draws(noise or self._noise(micro), self.strategy.group.mean)
        return phase.loss(players, micro.x, draws, carry)

    def _noise(self, micro: Batch) -> Noise:
        """Draws keyed by (seed, salt, name, position): the same for any number of ranks and after any restart."""

        def draw(name: str) -> Tensor:
            key = counters.key(self.seed, "noise", self.salt, name)
            value = counters.normal(key, micro.position, self.model.prior.shape, micro.x.dtype)
            if self.drawn is not None:
                self.drawn(name, micro.position, value)
            return value

        return draw

    def _drawing(self, micro: Batch, nimg: int) -> Drawing:
        """The same for what the decoder draws by itself: noise maps, styles to mix."""

        def draws(name: str, from_prior: bool) -> DecoderDraws:
            key = counters.key(self.seed, "decoder", self.salt, name)
            return PositionDraws(key, micro.position, nimg, micro.x.dtype, from_prior, self.strategy.group.mean)

        return draws


def one_hot(label: Tensor | None, classes: int, like: Tensor) -> Tensor | None:
    """(B, classes) condition of a conditional model, None for an unconditional one (classes 0)."""
    if classes == 0 or label is None:
        return None
    return nn.functional.one_hot(label, classes).to(like.dtype)


def by_place(batch: Batch, parts: int, first: int, size: int) -> list[Batch]:
    """This rank's samples of each of `parts` micro-batches of the global batch of `size` images from number `first` on.

    A sample's place in the global batch decides, so that what a micro-batch is made of does not depend on the number
    of ranks: batch statistics, and whatever else an objective asks of all its images, do not either. Parts are nearly
    equal; a rank's may be empty, their number is the same on every rank. Raises ValueError for samples that are not in
    the batch.
    """
    if parts == 1:
        return [batch]
    place = (batch.position.cpu() if batch.place is None else batch.place) - first
    if len(place) and not 0 <= int(place.min()) <= int(place.max()) < size:
        raise ValueError(f"positions {batch.position.tolist()}, expected {first} to {first + size - 1}")
    ends = torch.tensor([len(part) for part in torch.arange(size).tensor_split(parts)]).cumsum(0)
    part = torch.bucketize(place, ends, right=True)
    counts = part.bincount(minlength=parts).tolist()
    x, position, label = batch.x, batch.position, batch.label
    if bool((part.diff() < 0).any()):  # streams give them in order
        order = part.argsort(stable=True).to(x.device)
        x, position, label = x[order], position[order], None if label is None else label[order]
    labels = torch.split(label, counts) if label is not None else [None] * parts
    pieces = zip(torch.split(x, counts), torch.split(position, counts), labels, strict=True)
    return [Batch(*piece) for piece in pieces]


def evenly(batch: Batch, parts: int, *_: int) -> list[Batch]:
    """The same for tensors without values, whose places nobody knows: what `by_place` gives a rank that owns every so
    many-th sample, up to one."""
    labels = batch.label.tensor_split(parts) if batch.label is not None else [None] * parts
    pieces = zip(batch.x.tensor_split(parts), batch.position.tensor_split(parts), labels, strict=True)
    return [Batch(*piece) for piece in pieces]


@contextmanager
def statistics_only_of(model: Autoencoder, players: tuple[str, ...]) -> Iterator[None]:
    """Stops the batch-norm running statistics of the other players; batch statistics are used either way."""
    paused = [
        layer
        for name in ("encoder", "decoder")
        if name not in players
        for layer in getattr(model, name).modules()
        if isinstance(layer, _BatchNorm) and layer.track_running_stats
    ]
    for layer in paused:
        layer.track_running_stats = False
    try:
        yield
    finally:
        for layer in paused:
            layer.track_running_stats = True
