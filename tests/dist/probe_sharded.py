"""Started by test_sharded_checkpoints: save|load ddp|fsdp RUN. Prints hashes of a training state and of the next step.

`save` makes a state after two steps and writes it in parts; `load` begins with other weights, takes up what was
written, and says what it holds. `fsdp` has weights, average and moments in shards.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from sivae_dist import counters
from sivae_dist.distributed import launch
from sivae_dist.distributed.config import DistributedConfig
from sivae_dist.distributed.digest import digest
from sivae_dist.distributed.group import Group
from sivae_dist.distributed.replicated import Replicated
from sivae_dist.distributed.sharding import put
from sivae_dist.engine import agreement, checkpoint, checkpoint_sharded
from sivae_dist.engine.checkpoint_writer import CheckpointConfig
from sivae_dist.engine.optim import OptimConfig
from sivae_dist.models.residual import ResidualConfig


def sharded(model: nn.Module) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    for player in (model.encoder, model.decoder):
        fully_shard(player, mesh=mesh)
    return model


def step(strategy: Replicated, number: int) -> None:
    """Gradients from counters, the same whole ones for any number of ranks."""
    for player in strategy.players:
        for name, parameter in strategy.parameters(player).items():
            key = counters.key(number, player, name)
            whole: Tensor = counters.normal(
                key, torch.zeros(1, dtype=torch.int64), tuple(parameter.shape), torch.float32
            )
            parameter.grad = put(torch.empty_like(parameter, requires_grad=False), whole[0])
        strategy.step(player)


def hashes(model: nn.Module, ema: nn.Module, strategy: Replicated, group: Group) -> dict[str, str]:
    tensors = agreement.state_tensors(model, ema, strategy)
    return {name: digest(members, group).hash for name, members in tensors.items()}


torch.set_num_threads(1)
what, kind, run = sys.argv[1], sys.argv[2], Path(sys.argv[3])
started = launch.start(DistributedConfig(timeout_s=120))
group = started.group
torch.manual_seed({"save": 1, "load": 2}[what])
model, ema = (ResidualConfig(image_size=16, channels=(4, 6), zdim=5).build() for _ in range(2))
if kind == "fsdp":
    model, ema = sharded(model), sharded(ema)
players = {"encoder": model.encoder, "decoder": model.decoder}
strategy = Replicated(players, OptimConfig().build(players))  # of one rank: it only holds the players here
folder = run / "checkpoints"
if what == "save":
    for number in range(2):
        step(strategy, number)
    writer = checkpoint_sharded.ShardedWriter(CheckpointConfig(format="sharded"), folder, group)
    writer.take(20, model, ema, strategy, {"plan_salt": 0, "sums": {}, "data": "", "config": {}, "metrics": {}})
    now = hashes(model, ema, strategy, group)
    step(strategy, 2)  # what is being written does not change
    writer.close()
else:
    saved = checkpoint.read(checkpoint.latest(folder), parts=False)
    assert saved.sharded and not saved.tensors
    checkpoint_sharded.restore(saved, model, ema, strategy)
    now = hashes(model, ema, strategy, group)
    step(strategy, 2)
told = {"now": now, "then": hashes(model, ema, strategy, group)}
if group.is_main:
    print(json.dumps(told), flush=True)
started.finish()
os._exit(0)
