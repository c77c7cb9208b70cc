"""Speed and memory of a recipe's iteration, as it is and with some settings changed, on drawn pictures.

Everything between two batches of the training loop: both phases, reduction, optimizer, average. No data are read and
nothing is written. The networks are at their finest level, after the warm-up.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from sivae_dist.apps.bench.turns import Start, in_turns
from sivae_dist.data import Batch
from sivae_dist.distributed.group import Group
from sivae_dist.distributed.replicated import Replicated
from sivae_dist.engine import host_memory
from sivae_dist.engine.config import RunConfig, from_dict, merge, read_yaml
from sivae_dist.engine.ema import Ema
from sivae_dist.engine.iteration import Iteration
from sivae_dist.engine.loss_scale import LossScales
from sivae_dist.engine.precision import Precision
from sivae_dist.engine.predict_memory import AFTER_WARMUP
from sivae_dist.engine.trainer import build_objective
from sivae_dist.errors import UserError
from sivae_dist.models.blocks import recompute_blocks
from sivae_dist.ops import kernels

AS_IT_IS = "as configured"


@dataclass(frozen=True)
class Block:
    """Some iterations: seconds of each by the clock and by the process's CPU time; most bytes on a GPU, else None."""

    wall: float
    cpu: float
    peak: int | None


@dataclass(frozen=True)
class Row:
    """Medians over blocks. ratio: times as fast as the recipe (by CPU time on a CPU, by the clock on a GPU)."""

    name: str
    wall_ms: float
    cpu_ms: float
    images_per_s: float
    peak_bytes: int | None
    ratio: float


def varied(path: Path, changes: tuple[str, ...], batch: int | None) -> dict[str, RunConfig]:
    """The recipe, then one configuration for each of `changes`, each "section.key=value", several parted by commas.

    Raises UserError for a text that is none, and for settings that do not exist.
    """
    values = read_yaml(path)
    if batch is not None:
        values = merge(values, {"train": {"batch": batch, "accumulation": 1}})
    found = {AS_IT_IS: from_dict(values, str(path))}
    for text in changes:
        above: dict[str, Any] = {}
        for part in text.split(","):
            key, is_set, value = part.partition("=")
            section, has_key, setting = key.strip().partition(".")
            if not (is_set and has_key and section and setting):
                raise UserError(
                    f"--vary has {part[:100]!r}, expected section.key=value", "for example train.decode_once=true"
                )
            try:
                above = merge(above, {section: {setting: yaml.safe_load(value)}})
            except yaml.YAMLError:
                raise UserError(f"--vary has the value {value[:100]!r}, which is not valid YAML", "quote it") from None
        found[text] = from_dict(merge(values, above), f"--vary {text}")
    return found


def run(configs: dict[str, RunConfig], device: str, seconds: float) -> list[Row]:
    """One row a configuration, timed in turns for about `seconds` each. Raises UserError for what cannot run."""
    starts: dict[str, Start[Block]] = {
        name: functools.partial(_start, config, device, torch.get_num_threads()) for name, config in configs.items()
    }
    blocks = in_turns(starts, seconds=seconds, spent=lambda b: b.wall, block=1)
    on_cpu = torch.device(device).type == "cpu"
    times = {
        name: (statistics.median(b.wall for b in each), statistics.median(b.cpu for b in each))
        for name, each in blocks.items()
    }
    first = times[AS_IT_IS][on_cpu]
    return [
        Row(
            name,
            wall * 1e3,
            cpu * 1e3,
            configs[name].train.batch / wall,
            blocks[name][-1].peak,
            first / (wall, cpu)[on_cpu],
        )
        for name, (wall, cpu) in times.items()
    ]


def _start(config: RunConfig, place: str, threads: int) -> Callable[[int], Block]:
    """Builds what the trainer builds, on one process. The device is used by this process's iterations alone in turn."""
    torch.set_num_threads(threads)
    device, train = torch.device(place), config.train
    if device.type == "cpu":
        host_memory.keep_freed(train.keep_freed_mb)
    kernels.configure(config.kernels, device, used=config.model.fused_operators)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.precision.tf32
    torch.manual_seed(train.seed)
    model = config.model.build().to(device)
    layout = torch.channels_last if config.precision.channels_last else torch.contiguous_format
    x = torch.rand(train.batch, *model.sample_shape, device=device)
    if len(model.sample_shape) == 3:
        model.to(memory_format=layout)  # type: ignore[call-overload]
        x = x.contiguous(memory_format=layout)
    low, high = model.input_range or (0.0, 1.0)
    x = low + (high - low) * x
    recompute_blocks(model, train.recompute_from)
    players = {"encoder": model.encoder, "decoder": model.decoder}
    optimizers = config.optim.build(players)
    iteration = Iteration(
        model,
        build_objective(config, model),
        Replicated(players, optimizers, Group(), clip_norm=config.optim.clip_norm),
        accumulation=train.accumulation,
        precision=Precision(config.precision.resolved(), device.type),
        scales=LossScales.of_config(config.precision),
        decode_once=train.decode_once,
    )
    ema = Ema(config.ema, model)
    label = torch.zeros(train.batch, dtype=torch.int64, device=device) if model.condition_dim else None
    batch = Batch(x, AFTER_WARMUP + torch.arange(train.batch, device=device), label)

    def block(count: int) -> Block:
        _wait(device)
        began, cpu = time.perf_counter(), time.process_time()
        for _ in range(count):
            config.optim.apply(optimizers, AFTER_WARMUP)
            iteration(batch, nimg=AFTER_WARMUP, global_batch=train.batch)
            ema.update(model, AFTER_WARMUP, train.batch)
        _wait(device)
        wall, cpu = time.perf_counter() - began, time.process_time() - cpu
        peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
        return Block(wall / count, cpu / count, peak)

    return block


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
