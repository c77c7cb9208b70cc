"""Prints the seconds that a collective may take in each process group of this rank, after every way of making some."""

from __future__ import annotations

import json
import os
import sys

import torch
import torch.distributed as dist
from torch import nn

from sivae_dist.distributed import fsdp2, launch, parts, strategies
from sivae_dist.distributed.config import DistributedConfig

made: dict[str, list[float]] = {}


def look(what: str) -> None:
    """The groups that are there now and were not before."""
    known = sum(map(len, made.values()))
    groups = list(dist.distributed_c10d._world.pg_map)[known:]
    backends = [group._get_backend(torch.device("cpu")) for group in groups]
    made[what] = [backend.options._timeout.total_seconds() for backend in backends]


started = launch.start(DistributedConfig(ranks=2, timeout_s=float(sys.argv[1])))
look("launch")
for what in ({"strategy": "ddp", "overlap": True}, {"strategy": "fsdp2"}, {"strategy": "deepspeed"}):
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    config = DistributedConfig(**what)
    strategies.build(config, {"net": net}, {"net": torch.optim.Adam(net.parameters())}, started.group)
    look(config.strategy)
fsdp2.mesh_of(started.group, 1, "cpu")
look("copies of shards")
parts.background_group(started.group)
look("checkpoints in parts")
if started.group.is_main:
    print(json.dumps(made), flush=True)
started.finish()
os._exit(0)
