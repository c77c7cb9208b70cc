"""Started by test_ranks_differ: the digest of tensors in shards is that of the whole ones, on any mesh."""

import os

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from sivae_dist.distributed import launch
from sivae_dist.distributed.config import DistributedConfig
from sivae_dist.distributed.digest import digest

started = launch.start(DistributedConfig(timeout_s=60))
ranks = started.group.ranks
torch.manual_seed(0)
whole = {"a": torch.randn(7, 3), "b": torch.randn(1, 5).double(), "c": torch.randn(12), "step": torch.tensor(3.0)}
mesh = init_device_mesh("cpu", (ranks,))
shards = {name: distribute_tensor(t, mesh, [Shard(0)]) for name, t in whole.items() if t.dim()}
expected = digest(whole)
for tensors in (
    {**whole, **shards},
    {**shards, "step": distribute_tensor(whole["step"], mesh, [Replicate()])},
    {**whole, "a": shards["a"], "c": distribute_tensor(whole["c"], mesh, [Replicate()])},
):
    found = digest(tensors, started.group)
    assert found.hash == expected.hash and abs(found.norm / expected.norm - 1) < 1e-12, (found, expected)
if ranks == 4:
    hybrid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("copies", "shards"))
    cut = {name: distribute_tensor(t, hybrid, [Replicate(), Shard(0)]) for name, t in whole.items() if t.dim()}
    assert digest({**whole, **cut}, started.group).hash == expected.hash
changed = {**shards, "a": distribute_tensor(whole["a"].flip(0), mesh, [Shard(0)]), "step": whole["step"]}
assert digest(changed, started.group).hash != expected.hash
started.finish()
os._exit(0)
