"""How long training waits for a checkpoint, and how much slower it is while one is being written.

Iterations of a recipe on drawn pictures, with a checkpoint now and then. Also under `accelerate launch`, where each
rank waits for the slowest.
"""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from sivae_dist.data import Batch
from sivae_dist.distributed import launch as launching
from sivae_dist.distributed import strategies
from sivae_dist.distributed.group import Group
from sivae_dist.distributed.sync_batch_norm import synchronise_batch_norm
from sivae_dist.engine import agreement, checkpoint, checkpoint_sharded
from sivae_dist.engine.config import RunConfig, to_dict
from sivae_dist.engine.ema import Ema
from sivae_dist.engine.iteration import Iteration
from sivae_dist.engine.trainer import build_objective

FORMATS: tuple[Literal["whole", "sharded"], ...] = ("whole", "sharded")


@dataclass(frozen=True)
class Row:
    """Seconds, medians, of the slowest rank, and the bytes of all files.

    iteration: without a checkpoint under way; during: with one; wait: until training went on after asking for one;
    compare: of the ranks' weights, before it; write: to the end of the iteration in which it was complete.
    """

    format: str
    iteration: float
    during: float
    wait: float
    compare: float
    write: float
    bytes: int


def run(config: RunConfig, *, checkpoints: int, out: Path | None) -> tuple[list[Row], launching.Launch]:
    """One row a format. out: where they are written and removed again, a temporary folder if None. Collective."""
    launch = launching.start(config.distributed)
    group, device = launch.group, launch.device
    torch.manual_seed(config.train.seed)
    model = synchronise_batch_norm(config.model.build(), group).to(device)
    players = {"encoder": model.encoder, "decoder": model.decoder}
    ema = Ema(config.ema, model)
    strategy = strategies.build(
        config.distributed, players, config.optim.build(players), group, clip_norm=config.optim.clip_norm
    )
    strategy.follow(ema.model, model)
    iteration = Iteration(model, build_objective(config, model), strategy, accumulation=config.train.accumulation)
    size = -(-config.train.batch // group.ranks)
    position = torch.arange(group.rank * size, (group.rank + 1) * size, device=device)
    x = torch.rand(size, *model.sample_shape, device=device)

    def iterate() -> float:
        began = _now(device)
        iteration(Batch(x, position), nimg=0, global_batch=size * group.ranks)
        ema.update(model, size * group.ranks, size * group.ranks)
        return _slowest(group, _now(device) - began)

    with tempfile.TemporaryDirectory(dir=out) as temporary:
        folder = Path(group.texts(temporary)[0])  # rank 0's
        for _ in range(3):
            iterate()
        rows = []
        for name in FORMATS:
            settings = dataclasses.replace(config.checkpoint, format=name, keep_last=1, best=None, background=True)
            writer = checkpoint_sharded.writer_for(settings, folder / name, group)
            times: list[list[float]] = [[], [], [], [], []]
            plain, during, waits, compares, writes = times
            for number in range(checkpoints + 1):
                plain += [iterate() for _ in range(3)]
                began = _now(device)
                agreement.check_weights(group, config, 0, agreement.state_tensors(model, ema.model, strategy))
                compares.append(_slowest(group, _now(device) - began))
                began = _now(device)
                state = {"plan_salt": 0, "sums": {}, "data": "", "metrics": {}, "config": to_dict(config)}
                writer.take(number, model, ema.model, strategy, state)
                waits.append(_slowest(group, _now(device) - began))
                while _slowest(group, float(writer.writing)):
                    during.append(iterate())
                writer.wait()
                writes.append(_slowest(group, _now(device) - began))
            writer.close()
            group.barrier()
            size_of = sum(f.stat().st_size for f in (folder / name / checkpoint.name_of(checkpoints)).iterdir())
            a, b, c, d, e = (statistics.median(v[1:] or v or [0.0]) for v in times)
            rows.append(Row(name, a, b, c, d, e, size_of))
            group.barrier()
    return rows, launch


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _slowest(group: Group, seconds: float) -> float:
    return float(group.max_(torch.tensor(seconds, dtype=torch.float64, device=group.device())))
