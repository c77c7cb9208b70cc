"""What a rehearsal measures: each kind of iteration of the run, with a real batch."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.utils.flop_counter import FlopCounterMode

from sivae_dist.data import Batch
from sivae_dist.engine.storages import Storages
from sivae_dist.objectives import Phase, Terms

if TYPE_CHECKING:
    from sivae_dist.engine.trainer import Trainer


@dataclass
class PhaseCost:
    """One phase of this rank. seconds: of its passes and the optimizer step before it.

    activations: bytes, with the images of the batch.
    """

    name: str
    trains: tuple[str, ...]
    loss: float
    flops_per_image: float
    activations: int
    seconds: float = 0.0


@dataclass(frozen=True)
class Stretch:
    """Consecutive iterations of one kind: the same batch, level, fading and phases. first: images seen before it."""

    first: int
    size: int
    iterations: int


@dataclass
class Stage:
    """A stretch, measured. seconds: of one iteration; images: of this rank's part of a batch, (C, H, W) each.

    data:      bytes of a batch as it comes, at the data's own resolution
    preparing: bytes besides those while it becomes the images of the level
    """

    stretch: Stretch
    phases: list[PhaseCost]
    seconds: float
    images: int
    shape: tuple[int, ...]
    data: int
    preparing: int

    @property
    def activations(self) -> int:
        """Of the worst moment."""
        return max([self.preparing, *(phase.activations for phase in self.phases)])


def stretches_of(trainer: Trainer) -> Iterator[Stretch]:
    """The rest of the run. What holds for an iteration changes with the position, and never changes back."""
    nimg, total, growing = trainer.nimg, trainer.config.train.total_nimg, trainer.growing

    def kind(at: int) -> tuple[object, ...]:
        stage = growing.stage(at)
        level = (stage.level, stage.blend < 1) if stage is not None else None
        phases = trainer.iteration.objective.phases(at)
        return growing.size(at), level, [(phase.name, phase.trains) for phase in phases]

    while nimg < total:
        size = growing.size(nimg)
        low, high = 1, -(-(total - nimg) // size)  # the stretch has at least `low` iterations and at most `high`
        while low < high:
            middle = (low + high + 1) // 2
            same = kind(nimg + (middle - 1) * size) == kind(nimg)
            low, high = (middle, high) if same else (low, middle - 1)
        yield Stretch(nimg, size, low)
        nimg += low * size


def measured(trainer: Trainer, stretch: Stretch) -> Stage:
    """Two iterations as at the beginning of a stretch: one with everything counted, one timed. Collective."""
    trainer.growing.enter(stretch.first)
    host_batch = next(trainer.stream.batches(stretch.first, stretch.size))
    trainer.stream.close()
    data = host_batch.data.nbytes if host_batch.data.dim() == 4 else 0
    host_batch = host_batch.on(trainer.device)
    with Storages() as storages:
        batch = trainer.growing.prepare(host_batch, stretch.first, trainer.device, trainer.layout)
        preparing = storages.take_peak() - storages.now + batch.x.nbytes
    del host_batch
    phases = _costs(trainer, batch, stretch)
    seconds = _seconds(trainer, batch, stretch, phases)
    return Stage(stretch, phases, seconds, len(batch), tuple(batch.x.shape[1:]), data, preparing)


def _costs(trainer: Trainer, batch: Batch, stretch: Stretch) -> list[PhaseCost]:
    """One iteration with everything counted, which also warms up for the timed one."""
    counter, storages = FlopCounterMode(display=False), Storages()
    costs: list[PhaseCost] = []

    def observe(phase: Phase, terms: Terms) -> None:
        flops = counter.get_total_flops() - sum(int(c.flops_per_image) for c in costs)
        # What is left now stays after the phase: gradients, and the optimizer state of earlier phases.
        activations = storages.take_peak() - storages.now + batch.x.nbytes
        costs.append(PhaseCost(phase.name, phase.trains, 0.0, flops, activations))

    with counter, storages:
        out = trainer.iteration(batch, nimg=stretch.first, global_batch=stretch.size, observe=observe)
    for cost in costs:
        cost.flops_per_image /= max(1, len(batch))
        total = out.sums.get((cost.name, "loss"), torch.tensor(float("nan"))).detach().to(trainer.device)
        cost.loss = float(trainer.group.sum_(total.double().clone())) / stretch.size
    return costs


def _seconds(trainer: Trainer, batch: Batch, stretch: Stretch, costs: list[PhaseCost]) -> float:
    """Times one more iteration, phase by phase; the slowest rank counts."""

    def now() -> float:
        if trainer.device.type == "cuda":
            torch.cuda.synchronize(trainer.device)
        return time.perf_counter()

    marks = [now()]
    trainer.iteration(
        batch,
        nimg=stretch.first,
        global_batch=stretch.size,
        observe=lambda phase, terms: marks.append(now()),
    )
    marks[-1] = end = now()
    for cost, begin, finish in zip(costs, marks, marks[1:], strict=False):
        cost.seconds = finish - begin
    slowest = torch.tensor(end - marks[0], dtype=torch.float64, device=trainer.group.device())
    return float(trainer.group.max_(slowest))
