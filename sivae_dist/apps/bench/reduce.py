"""Summing gradients after the backward pass, or while it goes on: whole iterations, timed in turn on the same batches.

Started with several processes; each block of iterations is timed from a barrier to the slowest rank's end.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import torch

from sivae_dist import counters
from sivae_dist.data import Batch
from sivae_dist.distributed.launch import Launch
from sivae_dist.distributed.replicated import Replicated
from sivae_dist.engine.iteration import Iteration
from sivae_dist.engine.optim import OptimConfig
from sivae_dist.models.residual import ResidualConfig
from sivae_dist.objectives.soft_introvae import SoftIntroVaeConfig


@dataclass(frozen=True)
class Row:
    """One way of summing. seconds: median of an iteration; bytes, collectives: sent in one."""

    name: str
    seconds: float
    nbytes: float
    collectives: float


def run(launch: Launch, model: ResidualConfig, *, batch: int, bucket_mib: float, iterations: int) -> list[Row]:
    """batch: images a rank. Two iterations of each kind come before the timed ones. Collective."""
    group = launch.group
    steps = {}
    for name, overlap in (("after the backward pass", False), ("within it", True)):
        torch.manual_seed(0)
        net = model.build().to(launch.device)
        players = {"encoder": net.encoder, "decoder": net.decoder}
        strategy = Replicated(
            players, OptimConfig().build(players), group, overlap=overlap, bucket_bytes=int(bucket_mib * 2**20)
        )
        steps[name] = Iteration(net, SoftIntroVaeConfig().build(net.sample_shape), strategy)
    position = torch.arange(group.rank * batch, (group.rank + 1) * batch, device=launch.device)
    shape = (model.channels_in, model.image_size, model.image_size)
    x = Batch(counters.normal(counters.key(0, "x"), position, shape, torch.float32).sigmoid(), position)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(2 + iterations):
        for name, step in steps.items():
            group.barrier()
            began = time.perf_counter()
            step(x, nimg=number * batch * group.ranks, global_batch=batch * group.ranks)
            if launch.device.type == "cuda":
                torch.cuda.synchronize()
            spent = torch.tensor([time.perf_counter() - began], dtype=torch.float64, device=group.device())
            if number >= 2:
                seconds[name].append(float(group.max_(spent)))
            else:
                group.max_(spent)
    rows = []
    for name, step in steps.items():
        sent = step.strategy.traffic.take()
        rows.append(
            Row(name, statistics.median(seconds[name]), sent["dist/bytes_per_step"], sent["dist/collectives_per_step"])
        )
    return rows
