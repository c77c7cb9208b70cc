"""Trains the cases of probe_training with synchronised batch norm by the fused kernels, and stores what they leave.

Run by test_norm_kernels.py under `accelerate launch FILE RANKS MODE`. MODE: cpu, or mixed, where only even ranks have
kernels.
"""

from __future__ import annotations

import os
import sys

import numpy as np
import torch
from probe_training import run

from sivae_dist.distributed import launch
from sivae_dist.distributed.config import DistributedConfig
from sivae_dist.ops import kernels, norm_act

# Both tails of a block; a rank without samples, and micro-batches without any; blocks computed twice.
NAMES = ["soft", "introvae", "soft-empty-micro-batches", "soft-recomputed-one-image"]

if __name__ == "__main__":
    torch.set_num_threads(1)
    file, ranks, mode = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    started = launch.start(DistributedConfig(ranks=ranks, timeout_s=120))
    fused = mode == "cpu" or started.group.rank % 2 == 0
    os.environ["SIVAE_KERNELS"] = "cpu" if fused else "reference"
    calls: list[bool] = []
    module = sys.modules[norm_act.__module__]
    by_kernels = module.fused_norm_act  # type: ignore[attr-defined]

    def counted(*arguments: object, **options: object) -> torch.Tensor:
        calls.append(True)
        result: torch.Tensor = by_kernels(*arguments, **options)
        return result

    module.fused_norm_act = counted  # type: ignore[attr-defined]
    numbers = {name: value for case in NAMES for name, value in run(case, started.group)}
    assert kernels.mode() == ("cpu" if fused else "reference") and bool(calls) == fused
    for name, value in numbers.items():
        if "/after/" in name:
            for other in started.group.gather(torch.from_numpy(value).reshape(1, -1)):
                assert np.array_equal(other.numpy().ravel(), value.ravel()), f"{name} differs between ranks"
    if started.group.is_main:
        np.savez(file, **numbers)
    started.finish()
