"""A run's configuration: whether it can be read and so many processes can share it, and whether what it needs fits into
the device's memory.
"""

from __future__ import annotations

from pathlib import Path

from sivae_dist.apps.checks.base import Check, ok, problem, warning, within
from sivae_dist.apps.checks.storage import available_memory
from sivae_dist.devices import cuda_used
from sivae_dist.errors import UserError

NAME, MEMORY = "config", "run's memory"
_PREDICTION_S = 300.0
_NEARLY = 0.9  # of the memory: workspaces of convolutions and the allocator's slack come on top of what is predicted


def config(path: Path, processes: int | None) -> list[Check]:
    """Reads it and predicts the memory of one iteration. processes: that share the batch; None: one a GPU, or one."""
    from sivae_dist.engine.agreement import check_patience  # noqa: PLC0415
    from sivae_dist.engine.config import from_dict, read_yaml  # noqa: PLC0415

    run = from_dict(read_yaml(path), str(path))
    count = processes or max(_gpus(), 1)
    size = getattr(run.model, "image_size", None)
    what = f"{path}: {run.objective.name} on {run.model.name}"
    found = [ok(NAME, f"{what}{f' of {size} px' if size else ''}, batch {run.train.batch}, {run.train.kimg:g} kimg")]
    try:
        check_patience(count, run)
    except UserError as error:
        found = [problem(NAME, error.what, error.fix)]
    late = warning(MEMORY, f"not predicted within {_PREDICTION_S:.0f} s", f"sivae-dist memory {path} takes its time")
    return found + within(_PREDICTION_S, lambda: _memory(path, count), MEMORY, late)


def data_of(path: Path) -> tuple[str, str, float] | None:
    """(url, cache folder, its size in GB) of the shards that a configuration trains on; None if it has none."""
    from sivae_dist.data.loader import ShardsConfig  # noqa: PLC0415
    from sivae_dist.engine.config import from_dict, read_yaml  # noqa: PLC0415

    data = from_dict(read_yaml(path), str(path)).data
    if not isinstance(data, ShardsConfig) or not data.url:
        return None
    return data.url, data.cache_dir, data.cache_gb


def _gpus() -> int:
    import torch  # noqa: PLC0415

    return torch.cuda.device_count() if cuda_used() else 0


def _memory(path: Path, count: int) -> list[Check]:
    import torch  # noqa: PLC0415

    from sivae_dist.apps import memory_table  # noqa: PLC0415

    devices = _gpus()
    worst = max(memory_table.rows(path, memory_table.Wish(processes=count)), key=lambda row: row.bytes.total)
    need = float(worst.bytes.total)
    if devices:
        have, where = float(min(torch.cuda.get_device_properties(n).total_memory for n in range(devices))), "a GPU"
    else:
        have, where = available_memory(), "this machine"
        need *= count  # all on this machine
    images = f"{worst.images} image{'s' if worst.images > 1 else ''}"
    splits = f" in {worst.micro_batches} parts" if worst.micro_batches > 1 else ""
    pixels = f" at {worst.resolution} px" if worst.resolution else ""
    each = f"{count} processes with " if count > 1 else ""
    what = f"{each}{images}{splits}{pixels} in {worst.precision}: {_gib(need)} of {where}'s {_gib(have)}"
    remedy = (
        "raise train.accumulation, set train.recompute_from 0 or precision.dtype bf16, or lower train.batch; "
        f"`sivae-dist memory {path} --recompute-from none 0 --precision fp32 bf16` compares them"
    )
    if need > have:
        return [problem(MEMORY, what, remedy)]
    return [warning(MEMORY, f"{what}, which is nearly all", remedy) if need > _NEARLY * have else ok(MEMORY, what)]


def _gib(nbytes: float) -> str:
    size = nbytes / 2**30
    return f"{size:.1f} GiB" if size >= 1 else f"{size:.2g} GiB"
