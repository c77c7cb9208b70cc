"""Trains one iteration at 1024 pixels, one image, networks at full width, and tells what it took.

Run by test_1024.py in a process of its own: step_1024.py RECIPE PRECISION.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

from sivae_dist import counters
from sivae_dist.data import Batch
from sivae_dist.distributed.replicated import Replicated
from sivae_dist.engine.clock import memory
from sivae_dist.engine.config import from_dict, read_yaml
from sivae_dist.engine.ema import Ema
from sivae_dist.engine.iteration import Iteration
from sivae_dist.engine.precision import Precision
from sivae_dist.engine.trainer import build_objective
from sivae_dist.models.blocks import recompute_blocks

AFTER_WARMUP = 1 << 30  # images


def main(recipe: str, dtype: str) -> None:
    torch.set_num_threads(1)
    started, baseline = time.perf_counter(), memory(torch.device("cpu"))["mem/cpu_gib"]
    config = from_dict(read_yaml(Path(recipe)), recipe)
    torch.manual_seed(0)
    model = config.model.build()
    assert model.sample_shape == (3, 1024, 1024)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    recompute_blocks(model, 0)
    before = {name: float(value.detach().double().square().sum()) for name, value in model.named_parameters()}
    players = {"encoder": model.encoder, "decoder": model.decoder}
    optim = replace(config.optim, warmup_kimg=0.0)
    optimizers = optim.build(players)
    ema = Ema(config.ema, model)
    iteration = Iteration(
        model, build_objective(config, model), Replicated(players, optimizers), precision=Precision(dtype)
    )
    position = torch.zeros(1, dtype=torch.int64)
    coarse = counters.normal(counters.key(1, "x"), position, (3, 32, 32), torch.float32).sigmoid()
    low, high = model.input_range or (0.0, 1.0)
    x = low + (high - low) * torch.nn.functional.interpolate(coarse, size=(1024, 1024), mode="bilinear")
    phases: list[str] = []
    report = iteration(
        Batch(x.contiguous(memory_format=torch.channels_last), position),
        nimg=AFTER_WARMUP,
        global_batch=1,
        observe=lambda phase, terms: phases.append(phase.name),
    )
    ema.update(model, AFTER_WARMUP, 1)
    after = dict(model.named_parameters())
    still = [name for name, value in after.items() if float(value.detach().double().square().sum()) == before[name]]
    told = {
        "seconds": time.perf_counter() - started,
        "cpu_seconds": time.process_time(),
        "baseline_gib": baseline,
        "peak_gib": memory(torch.device("cpu"))["mem/cpu_gib"],
        "phases": phases,
        "skip": report.skip.text() if report.skip else None,
        "terms": {"/".join(key): float(value) for key, value in report.sums.items()},
        "gradients": {player: float(norm) for player, norm in report.grad_norm.items()},
        "still": still,
        "moved": len(after) - len(still),
        "without_gradient": [name for name, value in after.items() if value.grad is None],
        "finite": all(bool(v.isfinite().all()) for m in (model, ema.model) for v in m.state_dict().values()),
    }
    print(json.dumps(told))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
