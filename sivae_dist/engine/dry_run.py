"""A rehearsal: everything is built, every phase makes one real step, and the run that would follow is told.

Nothing is written. Memory per process is predicted as

    weights + gradients + optimizer + average + activations + communication

with weights and average: parameters and buffers; gradients: all parameters (one player's stay while the other trains);
optimizer: its state after a step; activations: what autograd holds at most during a phase (each storage once, without
parameters), measured; communication: one bucket of gradients, with several ranks. Workspaces of convolution libraries
and the slack of the memory allocator come on top; on CUDA devices the measured peak stands beside the prediction.
FLOPs are those torch counts in a phase's forward and backward passes (a multiply-add is two).
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from sivae_dist.data import Batch, Stream
from sivae_dist.distributed.replicated import BUCKET_BYTES
from sivae_dist.engine.clock import memory
from sivae_dist.engine.schedule import due
from sivae_dist.objectives import Phase, Terms

if TYPE_CHECKING:
    from sivae_dist.engine.trainer import Trainer

_PROBES = 1000  # positions at which the run is asked for its phases, to find warm-ups
_COUNTED_ONE_BY_ONE = 2_000_000  # iterations


@dataclass
class PhaseCost:
    """One phase of this rank. seconds: of its passes and the optimizer step before it."""

    name: str
    trains: tuple[str, ...]
    loss: float
    flops_per_image: float
    activations: int  # bytes
    seconds: float = 0.0


@dataclass
class Stage:
    """A stretch of the run with the same phases. first: images seen at its beginning; seconds: of one iteration."""

    first: int
    iterations: int
    phases: list[PhaseCost]
    seconds: float


def dry_run(trainer: Trainer) -> None:
    """Measures and prints on rank 0. Collective; leaves the process group."""
    size = trainer.growing.finest
    batch = next(trainer.stream.batches(trainer.nimg, size)).to(
        trainer.device, trainer.model.input_range, memory_format=trainer.layout
    )
    stages = []
    for first, iterations in _stages(trainer):
        phases = _costs(trainer, batch, first)
        seconds = _seconds(trainer, batch, first, phases)
        stages.append(Stage(first, iterations, phases, seconds))
    trainer.stream.close()
    text = report(trainer, batch, stages)
    if trainer.group.is_main:
        print(text)
    trainer.launch.finish()


def _stages(trainer: Trainer) -> list[tuple[int, int]]:
    """(first nimg, iterations) of each stretch with the same phases, from now to the end."""
    size, total, objective = trainer.growing.finest, trainer.config.train.total_nimg, trainer.iteration.objective
    left = max(1, -(-(total - trainer.nimg) // size))
    starts: list[int] = []
    before: Any = None
    for number in np.unique(np.linspace(0, left - 1, min(left, _PROBES)).astype(np.int64)).tolist():
        phases = [(phase.name, phase.trains) for phase in objective.phases(trainer.nimg + number * size)]
        if phases != before:
            starts.append(number)
        before = phases
    ends = [*starts[1:], left]
    return [(trainer.nimg + a * size, b - a) for a, b in zip(starts, ends, strict=True)]


def _costs(trainer: Trainer, batch: Batch, nimg: int) -> list[PhaseCost]:
    """One iteration with everything counted, which also warms up for the timed one."""
    counter, held = FlopCounterMode(display=False), Held(trainer.model)
    costs: list[PhaseCost] = []

    def observe(phase: Phase, terms: Terms) -> None:
        flops = counter.get_total_flops() - sum(int(c.flops_per_image) for c in costs)
        costs.append(PhaseCost(phase.name, phase.trains, 0.0, flops, held.take_peak()))

    with counter, held.watching():
        out = trainer.iteration(batch, nimg=nimg, global_batch=trainer.growing.finest, observe=observe)
    for cost in costs:
        cost.flops_per_image /= max(1, len(batch))
        total = out.sums.get((cost.name, "loss"), torch.tensor(float("nan"))).detach().to(trainer.device)
        cost.loss = float(trainer.group.sum_(total.double().clone())) / trainer.growing.finest
    return costs


def _seconds(trainer: Trainer, batch: Batch, nimg: int, costs: list[PhaseCost]) -> float:
    """Times one more iteration, phase by phase; the slowest rank counts."""

    def now() -> float:
        if trainer.device.type == "cuda":
            torch.cuda.synchronize(trainer.device)
        return time.perf_counter()

    marks = [now()]
    trainer.iteration(
        batch,
        nimg=nimg,
        global_batch=trainer.growing.finest,
        observe=lambda phase, terms: marks.append(now()),
    )
    marks[-1] = end = now()
    for cost, begin, finish in zip(costs, marks, marks[1:], strict=False):
        cost.seconds = finish - begin
    slowest = torch.tensor(end - marks[0], dtype=torch.float64, device=trainer.group.device())
    return float(trainer.group.max_(slowest))


class Held:
    """Bytes that autograd holds for backward passes: each storage once, without a model's own."""

    def __init__(self, model: nn.Module) -> None:
        self._own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
        self._users: dict[int, int] = {}
        self.now = self.peak = 0

    def take_peak(self) -> int:
        """The most since the last call."""
        peak, self.peak = self.peak, self.now
        return peak

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Within, tensors saved for backward passes are counted while they are kept."""
        with torch.autograd.graph.saved_tensors_hooks(lambda t: _Kept(self, t), lambda kept: kept.tensor):
            yield

    def add(self, storage: int, size: int, change: int) -> None:
        """One more or one fewer keeper of a storage."""
        if storage in self._own:
            return
        users = self._users.get(storage, 0)
        self._users[storage] = users + change
        if not users or not users + change:
            self.now += change * size
            self.peak = max(self.peak, self.now)


class _Kept:
    """What a saved tensor is replaced by; its end is the end of the keeping."""

    def __init__(self, held: Held, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        self.held, self.tensor, self.place = held, tensor, (storage.data_ptr(), storage.nbytes())
        held.add(*self.place, 1)

    def __del__(self) -> None:
        self.held.add(*self.place, -1)


def report(trainer: Trainer, batch: Batch, stages: list[Stage]) -> str:
    """The text of a dry run."""
    parts = [
        [f"dry run: nothing is written to {trainer.folder.root}", _launch(trainer)],
        _networks(trainer),
        *(_stage(stage, trainer) for stage in stages),
        _memory(trainer, batch, stages),
        _data(trainer),
        _schedule(trainer, stages),
    ]
    return "\n".join(line for part in parts for line in part)


def _launch(trainer: Trainer) -> str:
    facts = trainer.launch.describe()
    ranks = f"{facts['ranks']} rank{'s' if trainer.group.ranks > 1 else ''} on {facts['device']}"
    return f"{ranks}, {facts['threads']} threads each; model {trainer.config.model.name}"


def _networks(trainer: Trainer) -> list[str]:
    return [
        f"{name:<9}{sum(p.numel() for p in player.parameters()):>14,} parameters, "
        f"{_size(_bytes(player.parameters()) + _bytes(player.buffers()))} with buffers"
        for name, player in (("encoder", trainer.model.encoder), ("decoder", trainer.model.decoder))
    ]


def _stage(stage: Stage, trainer: Trainer) -> list[str]:
    size = trainer.growing.finest
    lines = [
        f"from {stage.first / 1000:g} kimg, {stage.iterations:,} iterations of {stage.seconds:.3f} s "
        f"({size / stage.seconds:.1f} img/s):"
    ]
    for phase in stage.phases:
        lines.append(
            f"  phase {phase.name} (trains {' and '.join(phase.trains)}): loss {phase.loss:.6g}, "
            f"{phase.flops_per_image / 1e9:.4g} GFLOP per image, {phase.seconds:.3f} s, "
            f"activations {_size(phase.activations)}"
        )
    return lines


def sizes(trainer: Trainer, stages: list[Stage]) -> dict[str, int]:
    """Bytes per process, by what they are for; see the module's formula."""
    model = trainer.model
    parameters = _bytes(model.parameters())
    states = [value for o in trainer.optimizers.values() for s in o.state.values() for value in s.values()]
    largest = max(_bytes(player.parameters()) for player in (model.encoder, model.decoder))
    return {
        "weights": parameters + _bytes(model.buffers()),
        "gradients": parameters,
        "optimizer": _bytes(v for v in states if isinstance(v, Tensor)),
        "average": _bytes(trainer.ema.model.state_dict().values()),
        "activations": max(phase.activations for stage in stages for phase in stage.phases),
        "communication": min(BUCKET_BYTES, largest) if trainer.group.ranks > 1 else 0,
    }


def _memory(trainer: Trainer, batch: Batch, stages: list[Stage]) -> list[str]:
    parts = sizes(trainer, stages)
    named = " + ".join(f"{name} {_size(size)}" for name, size in parts.items())
    lines = [f"memory per process, predicted: {_size(sum(parts.values()))} = {named} ({len(batch)} images)"]
    measured = memory(trainer.device)
    lines.append("measured peak: " + ", ".join(f"{name} {value:.3f}" for name, value in measured.items()))
    return lines


def _data(trainer: Trainer) -> list[str]:
    stream: Stream = trainer.stream
    total, ranks = trainer.config.train.total_nimg, trainer.group.ranks
    lines = [
        f"data: {stream.epoch_size:,} samples, {total / stream.epoch_size:.2f} epochs in the run, "
        f"about {stream.epoch_size / ranks:,.0f} samples per rank and epoch"
    ]
    plan, manifest = getattr(stream, "plan", None), getattr(stream, "manifest", None)
    if plan is not None and manifest is not None:
        shards = len(plan.counts)
        own = [int(plan.lane_sizes()[rank::ranks].sum()) for rank in range(ranks)]
        lines.append(
            f"  {shards} shards, {plan.lanes} lanes ({plan.lanes // ranks} or more per rank), "
            f"samples per rank {min(own):,} to {max(own):,}"
        )
    return lines


def _schedule(trainer: Trainer, stages: list[Stage]) -> list[str]:
    config, now = trainer.config, trainer.nimg
    total, size = config.train.total_nimg, trainer.growing.finest
    iterations = max(0, -(-(total - now) // size))
    counts = {
        "reports": config.tracking.every_kimg,
        "evaluations": config.eval.every_kimg,
        "picture grids": config.tracking.images_every_kimg,
        "checkpoints": config.checkpoint.every_kimg,
    }
    told = ", ".join(f"{times_due(now, total, size, every):,} {name}" for name, every in counts.items())
    seconds = sum(stage.iterations * stage.seconds for stage in stages) if iterations else 0.0
    parts = sizes(trainer, stages)
    checkpoint = parts["weights"] + parts["average"] + parts["optimizer"]
    folder = trainer.folder.root.absolute()
    while not folder.exists():
        folder = folder.parent
    kept = config.checkpoint.keep_last + 2  # the best one, and the one being written
    growth = ["  the model grows: all figures are those of the finest level, which costs most"]
    return [
        *(growth if config.progressive.enabled else []),
        f"schedule: {now / 1000:g} to {total / 1000:g} kimg, {iterations:,} iterations of {size} images; {told}",
        f"  a checkpoint takes {_size(checkpoint)}; up to {kept} at once need {_size(kept * checkpoint)}, "
        f"{_size(shutil.disk_usage(folder).free)} are free",
        f"estimated time: {_duration(seconds)} for the iterations (evaluations, pictures and checkpoints not counted)",
    ]


def times_due(start: int, total: int, size: int, every_kimg: float) -> int:
    """How often something recurring happens on the way from `start` to `total`, the one at the end included."""
    if start >= total:
        return 0
    if (total - start) // size > _COUNTED_ONE_BY_ONE:
        count = int(total / every_kimg / 1000) - int(start / every_kimg / 1000) if every_kimg > 0 else 0
        return max(1, count)
    ends = range(start + size, total + 1, size)
    return sum(due(end, size, every_kimg) or end >= total for end in ends)


def _bytes(tensors: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _size(size: float) -> str:
    return f"{size / (1 << 30):.2f} GiB" if size >= 1 << 30 else f"{size / (1 << 20):.2f} MiB"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.1f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    days, hours = divmod(hours, 24)
    return " ".join(f"{n} {unit}" for n, unit in ((days, "d"), (hours, "h"), (minutes, "min")) if n)
