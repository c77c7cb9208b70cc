"""Trains tiny models under every strategy on however many ranks it is started on, with a restore in the middle.

Run by test_strategies.py, under `accelerate launch` and in its own process; what is stored must agree: terms, gradient
norms, and the whole state after the last iteration (weights, average, optimizer), gathered from whoever holds it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
import torch
from probe_training import global_batch, share

from sivae_dist.distributed import launch, strategies
from sivae_dist.distributed.config import DistributedConfig
from sivae_dist.distributed.group import Group
from sivae_dist.distributed.sync_batch_norm import synchronise_batch_norm
from sivae_dist.engine import checkpoint
from sivae_dist.engine.ema import Ema, EmaConfig
from sivae_dist.engine.iteration import Iteration
from sivae_dist.engine.loss_scale import LossScales
from sivae_dist.engine.optim import OptimConfig, PlayerOptim
from sivae_dist.engine.precision import Precision
from sivae_dist.models.blocks import recompute_blocks
from sivae_dist.models.modulated import ModulatedConfig
from sivae_dist.models.residual import ResidualConfig
from sivae_dist.models.style import StyleConfig
from sivae_dist.objectives.soft_introvae import SoftIntroVaeConfig
from sivae_dist.objectives.vae import VaeConfig

ITERATIONS = 3
DDP = DistributedConfig(strategy="ddp")
LOSS_SCALES = {False: 2.0**8, True: 2.0**20}  # the second overflows
SOFT = SoftIntroVaeConfig(beta_neg=4.0, gamma_r=0.5)


@dataclass(frozen=True)
class Cell:
    """One training: of which network, in which format, how."""

    network: str = "residual"
    dtype: str = "fp64"
    accumulation: int = 1
    size: int = 7  # global batch: does not divide by 2 or 3; 1 leaves ranks without data
    joint: bool = False  # one phase that trains both players
    poisoned: bool = False  # rank 0's images are not numbers once: that iteration is skipped and leaves no trace
    grows: bool = False  # one level finer from the second iteration on, which fades it in
    recomputed: bool = False  # every block
    overflows: bool = False  # fp16: losses are scaled by so much that gradients overflow at first
    distributed: DistributedConfig = DDP

    @property
    def twin(self) -> Cell:
        """The training that it must equal: whole, on one rank, without micro-batches where these do not matter."""
        return replace(self, poisoned=False, recomputed=False, distributed=DDP)


def _cells(*options: DistributedConfig, dtypes: tuple[str, ...]) -> dict[str, Cell]:
    cells = {}
    for distributed in options:
        name = distributed.strategy + (f"{distributed.zero_stage}" if distributed.strategy == "deepspeed" else "")
        for dtype in dtypes:
            for accumulation in (1, 4):
                for network in ("residual", "style", "modulated"):
                    key = f"{name}/{dtype}/{accumulation}/{network}"
                    cells[key] = Cell(network, dtype, accumulation, distributed=distributed)
        wide = dtypes[0]
        cells[f"{name}/{wide}/one-image"] = Cell(dtype=wide, size=1, distributed=distributed)
        cells[f"{name}/{wide}/poisoned"] = Cell(dtype=wide, poisoned=True, distributed=distributed)
        cells[f"{name}/{wide}/joint"] = Cell(dtype=wide, joint=True, accumulation=2, distributed=distributed)
        cells[f"{name}/{wide}/grows"] = Cell("style", wide, grows=True, distributed=distributed)
        cells[f"{name}/{wide}/recomputed"] = Cell(dtype=wide, recomputed=True, distributed=distributed)
        for overflows in (False, True):
            key = f"{name}/fp16/{'overflows' if overflows else 'residual'}"
            cells[key] = Cell(dtype="fp16", accumulation=2, overflows=overflows, distributed=distributed)
    return cells


FSDP2 = DistributedConfig(strategy="fsdp2", unit_parameters=200)
ZERO = DistributedConfig(strategy="deepspeed")
# Buckets of a few parameters each, so that there are several; the same ones after the backward pass and within it.
LATE = DistributedConfig(strategy="ddp", bucket_mib=0.002)
CELLS = {
    **_cells(DDP, dtypes=("fp64", "fp32", "bf16")),
    **_cells(FSDP2, dtypes=("fp64", "bf16")),
    **_cells(ZERO, replace(ZERO, zero_stage=2), dtypes=("fp32", "bf16")),
    "deepspeed1/fp32/offload": Cell(
        dtype="fp32", accumulation=2, poisoned=True, distributed=replace(ZERO, zero_offload=True)
    ),
    **{
        f"ddp-{when}/fp64/{network}": Cell(network, "fp64", accumulation, joint=joint, distributed=distributed)
        for when, distributed in (("late", LATE), ("overlap", replace(LATE, overlap=True)))
        for network, accumulation, joint in (("residual", 1, False), ("style", 4, False), ("residual-joint", 1, True))
    },
    "fsdp2/fp64/keep-whole": Cell(distributed=replace(FSDP2, keep_whole=True)),
    "fsdp2/fp64/copies": Cell(accumulation=2, distributed=replace(FSDP2, shard_ranks=2)),  # with 4 ranks: two copies
}
FOUR_RANKS = ("fsdp2/fp64/copies",)
# What the default run of the tests looks at, in a launch that it makes anyway.
CORNER = (
    "ddp-late/fp64/residual",
    "ddp-overlap/fp64/residual",
    "fsdp2/fp64/1/residual",
    "fsdp2/fp64/1/style",
    "fsdp2/fp64/one-image",
    "fsdp2/fp64/joint",
)


class Training:
    """Everything that is saved and restored."""

    def __init__(self, cell: Cell, group: Group, seed: int) -> None:
        torch.manual_seed(seed)
        if cell.network.startswith("residual"):
            # Statistics of a micro-batch of two images make much of half precision's rounding.
            norm = "group" if cell.accumulation > 1 and cell.dtype in ("fp16", "bf16") else "batch"
            model = ResidualConfig(image_size=12, channels=(4, 6), zdim=5, norm=norm).build()  # type: ignore[arg-type]
        else:
            model = (StyleConfig if cell.network == "style" else ModulatedConfig).tiny().build()
            # Of three: the finest is used by no rank.
            model.set_level(1 if cell.network == "style" and not cell.grows else 0)
            with torch.no_grad():  # noise would not matter yet
                for parameter in model.parameters():
                    parameter.add_(0.1)
        self.dtype = torch.float64 if cell.dtype == "fp64" else torch.float32
        self.model = synchronise_batch_norm(model.to(self.dtype), group)
        players = {"encoder": self.model.encoder, "decoder": self.model.decoder}
        # A large eps: steps follow gradients smoothly, so that rounding stays as small as it is in the gradients.
        player = PlayerOptim(lr=1e-3, beta1=0.0 if cell.network == "style" else 0.9, eps=1e-4)
        optim = OptimConfig(player, player, "lreq_adam" if cell.network == "style" else "adam")
        optimizers = optim.build(players)
        self.ema = Ema(EmaConfig(half_life_kimg=0.01, rampup=0), self.model)
        self.strategy = strategies.build(cell.distributed, players, optimizers, group, clip_norm=0.5)
        self.strategy.follow(self.ema.model, self.model)
        objective = (VaeConfig() if cell.joint else SOFT).build(self.model.sample_shape)
        recompute_blocks(self.model, 0 if cell.recomputed else None)
        precision = Precision(cell.dtype if cell.dtype in ("bf16", "fp16") else "fp32")  # type: ignore[arg-type]
        self.scales = LossScales(enabled=cell.dtype == "fp16", start=LOSS_SCALES[cell.overflows])
        self.iteration = Iteration(
            self.model,
            objective,
            self.strategy,
            accumulation=cell.accumulation,
            precision=precision,
            scales=self.scales,
        )

    def grow(self, number: int) -> None:
        """As engine.growing does before an iteration."""
        for model in (self.model, self.ema.model):
            model.set_level(min(number, 1), 0.4 if number == 1 else 1.0)
        if number == 1:
            self.strategy.forget()

    def snapshot(self) -> checkpoint.Snapshot:
        return checkpoint.snapshot(0, self.model, self.ema.model, self.strategy, {})


def run(cell: Cell, group: Group) -> dict[str, np.ndarray]:
    training = Training(cell, group, seed=0)
    numbers: dict[str, np.ndarray] = {}
    for number in range(ITERATIONS):
        if number == 2:
            if cell.distributed.overlap:
                numbers["traffic/early"] = np.array(training.strategy.sent_early)  # type: ignore[attr-defined]
            saved, scales = training.snapshot(), training.scales.state()
            training = Training(cell, group, seed=1)
            training.scales.load(scales)
            checkpoint.restore(saved, training.model, training.ema.model, training.strategy)
        if cell.grows:
            training.grow(number)
        batch = share(global_batch(number, cell.size, training.model.sample_shape), group)
        batch = replace(batch, x=batch.x.to(training.dtype))
        if cell.poisoned and number == 1:
            bad = replace(batch, x=batch.x * float("nan") if group.is_main else batch.x)
            assert training.iteration(bad, nimg=number * cell.size, global_batch=cell.size).skip is not None
            training.strategy.traffic.take()
        report = training.iteration(batch, nimg=number * cell.size, global_batch=cell.size)
        while report.skip is not None and report.skip.overflow:  # halves the scale, on all ranks
            training.strategy.traffic.take()
            report = training.iteration(batch, nimg=number * cell.size, global_batch=cell.size)
        assert report.skip is None, (cell, report.skip.text())
        training.ema.update(training.model, (number + 1) * cell.size, cell.size)
        for key, total in report.sums.items():
            numbers[f"term{number}/{'/'.join(key)}"] = group.sum_(total.detach().double()).numpy()
        for player, norm in report.grad_norm.items():
            numbers[f"norm{number}/{player}"] = norm.detach().double().numpy()
    numbers["scales"] = np.array(list(training.scales.scale.values()))
    if group.ranks > 1:
        numbers |= {f"traffic/{tag}": np.array(value) for tag, value in training.strategy.traffic.take().items()}
    for stem, tensors in training.snapshot().tensors.items():
        numbers |= {f"{stem}/{name}": value.double().numpy() for name, value in tensors.items()}
    return numbers


def collect(names: Iterable[str], group: Group) -> dict[str, np.ndarray]:
    return {f"{name}:{key}": value for name in names for key, value in run(CELLS[name], group).items()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    started = launch.start(DistributedConfig(ranks=int(sys.argv[2]), timeout_s=120))
    together = collect(sys.argv[3:], started.group)
    if started.group.is_main:
        np.savez(sys.argv[1], **together)
    started.finish()
    os._exit(0)  # as the command line does: a destructor of the process group may abort a rank that exits normally
