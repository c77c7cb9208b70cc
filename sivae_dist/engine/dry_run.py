"""A rehearsal: everything is built, every phase makes one real step, and the run that would follow is told.

Nothing is written. Memory per process is predicted as

    weights + gradients + optimizer + average + data + activations + communication

with weights and average: parameters and buffers; gradients: all parameters (one player's stay while the other trains);
optimizer: its state after a step; data: the bytes of a batch at the data's own resolution (the next one's, while this
one is trained on); activations: the most that a phase's tensors held besides these, measured on a real batch
(`sivae-dist memory` tells it without any), both of the stage where they come to most; communication: one bucket of
gradients, with several ranks. Workspaces of convolution libraries and the slack of the memory allocator come on top; on
CUDA devices the measured peak stands beside the prediction.
FLOPs are those torch counts in a phase's forward and backward passes (a multiply-add is two).
"""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

from torch import Tensor

from sivae_dist.data import Stream
from sivae_dist.distributed.sharding import local
from sivae_dist.engine import notes
from sivae_dist.engine.clock import memory
from sivae_dist.engine.dry_run_measure import Stage, Stretch, measured, stretches_of
from sivae_dist.engine.schedule import due

if TYPE_CHECKING:
    from sivae_dist.engine.trainer import Trainer

_COUNTED_ONE_BY_ONE = 2_000_000  # iterations


def dry_run(trainer: Trainer) -> None:
    """Measures and prints on rank 0. Collective; leaves the process group."""
    stretches = list(stretches_of(trainer))
    # A finished run is measured where it ended.
    stages = [measured(trainer, s) for s in stretches or [Stretch(trainer.nimg, trainer.growing.size(trainer.nimg), 0)]]
    text = report(trainer, stages)
    if trainer.group.is_main:
        print(text)
    trainer.launch.finish()


def report(trainer: Trainer, stages: list[Stage]) -> str:
    """The text of a dry run."""
    parts = [
        [f"dry run: nothing is written to {trainer.folder.root}", _launch(trainer)],
        [f"note: {note}" for note in notes.before(trainer.config, trainer.model.levels, trainer.folder, trainer.nimg)],
        _networks(trainer),
        *(_stage(stage) for stage in stages),
        _memory(trainer, stages),
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


def _stage(stage: Stage) -> list[str]:
    s, shape = stage.stretch, " x ".join(map(str, stage.shape))
    lines = [
        f"from {s.first / 1000:g} kimg, {s.iterations:,} iterations of {s.size} images of {shape}, "
        f"{stage.seconds:.3f} s each ({s.size / stage.seconds:.1f} img/s):"
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
    distributed = trainer.config.distributed
    worst = max(stages, key=lambda stage: stage.data + stage.activations)
    largest = max(_bytes(player.parameters()) for player in (model.encoder, model.decoder))
    return {
        "weights": parameters + _bytes(model.buffers()),
        "gradients": parameters,
        "optimizer": _bytes(v for v in states if isinstance(v, Tensor)),
        "average": _bytes(trainer.ema.model.state_dict().values()),
        "data": worst.data,
        "activations": worst.activations,
        # With overlap the sums of all buckets are under way at once.
        "communication": (largest if distributed.overlap else min(int(distributed.bucket_mib * 2**20), largest))
        if trainer.group.ranks > 1
        else 0,
    }


def _memory(trainer: Trainer, stages: list[Stage]) -> list[str]:
    parts = sizes(trainer, stages)
    named = " + ".join(f"{name} {_size(size)}" for name, size in parts.items())
    total, images = _size(sum(parts.values())), max(stage.images for stage in stages)
    lines = [f"memory per process, predicted: {total} = {named} ({images} images)"]
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
    total = config.train.total_nimg
    stretches = [stage.stretch for stage in stages]
    iterations = sum(stretch.iterations for stretch in stretches)
    counts = {
        "reports": config.tracking.every_kimg,
        "evaluations": config.eval.every_kimg,
        "picture grids": config.tracking.images_every_kimg,
        "checkpoints": config.checkpoint.every_kimg,
    }
    if counts["picture grids"] == 0:
        del counts["picture grids"]
    told = ", ".join(f"{times_due(stretches, every):,} {name}" for name, every in counts.items())
    seconds = sum(stage.stretch.iterations * stage.seconds for stage in stages)
    parts = sizes(trainer, stages)
    checkpoint = parts["weights"] + parts["average"] + parts["optimizer"]
    folder = trainer.folder.root.absolute()
    while not folder.exists():
        folder = folder.parent
    kept = config.checkpoint.keep_last + 2  # the best one, and the one being written
    return [
        f"schedule: {now / 1000:g} to {total / 1000:g} kimg, {iterations:,} iterations; {told}",
        f"  a checkpoint takes {_size(checkpoint)}; up to {kept} at once need {_size(kept * checkpoint)}, "
        f"{_size(shutil.disk_usage(folder).free)} are free",
        f"estimated time: {_duration(seconds)} for the iterations (evaluations, pictures and checkpoints not counted)",
    ]


def times_due(stretches: list[Stretch], every_kimg: float) -> int:
    """How often something recurring happens on the way, the one at the end included."""
    count = sum(_due_in(stretch, every_kimg) for stretch in stretches)
    last = stretches[-1]
    end = last.first + last.iterations * last.size
    return count + (last.iterations > 0 and not due(end, last.size, every_kimg))


def _due_in(stretch: Stretch, every_kimg: float) -> int:
    first, size, end = stretch.first, stretch.size, stretch.first + stretch.iterations * stretch.size
    if stretch.iterations <= _COUNTED_ONE_BY_ONE:
        return sum(due(at, size, every_kimg) for at in range(first + size, end + 1, size))
    passed = int(end / every_kimg / 1000) - int(first / every_kimg / 1000) if every_kimg > 0 else 0
    return min(stretch.iterations, passed)


def _bytes(tensors: Any) -> int:
    """Of what this rank holds of them."""
    return sum(held.numel() * held.element_size() for held in map(local, tensors))


def _size(size: float) -> str:
    return f"{size / (1 << 30):.2f} GiB" if size >= 1 << 30 else f"{size / (1 << 20):.2f} MiB"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.1f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    days, hours = divmod(hours, 24)
    return " ".join(f"{n} {unit}" for n, unit in ((days, "d"), (hours, "h"), (minutes, "min")) if n)
