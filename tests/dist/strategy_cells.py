"""What cells of probe_strategies.py must agree with, and how closely."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping

import numpy as np
import torch
from probe_strategies import CELLS, LOSS_SCALES, Cell, Training, run

from sivae_dist.distributed.group import Group

# Relative to the largest entry of an array, against one process that trains on the global batch. In float32 a sum's
# order shows; Adam's large eps keeps it from growing. In half precision it shows in every activation.
TOLERANCE = {"fp64": 1e-9, "fp32": 2e-4, "bf16": 5e-2, "fp16": 1e-2}
# In half precision, against `ddp` on as many ranks, which rounds the same sums of the same activations: what the first
# phase makes of equal weights; and whole states at the end, where a last bit of a weight may have turned an activation.
FIRST_PHASE, SAME_RANKS = 1e-6, 2e-2
HALF = ("bf16", "fp16")


@functools.cache
def alone(cell: Cell) -> dict[str, np.ndarray]:
    torch.set_num_threads(1)
    return run(cell, Group())


def check_cells(stored: Mapping[str, np.ndarray], names: Iterable[str], ranks: int) -> None:
    """stored: what a launch on `ranks` processes has left, by CELL:NAME."""
    for name in names:
        cell, numbers = CELLS[name], of(stored, name)
        expected = alone(cell.twin)
        assert set(expected) == {key for key in numbers if not key.startswith("traffic/")}, name
        behind = left_behind(expected) if cell.distributed.strategy == "deepspeed" else ()
        for key, value in expected.items():
            if key.startswith(behind) or cell.overflows:  # which sums overflow depends on how many images they are of
                continue
            if cell.dtype not in HALF or key.startswith(("term", "norm")):
                close(numbers[key], value, TOLERANCE[cell.dtype], f"{name} on {ranks} ranks: {key}")
        if cell.overflows:
            assert (numbers["scales"] < LOSS_SCALES[True]).all(), name
        if cell.dtype in HALF and cell.distributed.strategy != "ddp":
            twin = of(stored, "/".join(["ddp", *name.split("/")[1:]]))
            for key in expected:
                first = not cell.overflows and key.startswith(("term0/encoder", "norm0/encoder"))
                close(
                    numbers[key],
                    twin[key],
                    FIRST_PHASE if first else SAME_RANKS,
                    f"{name} on {ranks} ranks, against ddp: {key}",
                )
        if cell.distributed.overlap:  # the same buckets: the same bits
            assert numbers["traffic/early"] > 4, name  # from the second iteration on
            twin = of(stored, name.replace("overlap", "late"))
            for key in expected:
                assert np.array_equal(numbers[key], twin[key]), f"{name} on {ranks} ranks, against no overlap: {key}"
        if not cell.grows:  # which gradients there are changes
            check_traffic(cell, numbers, ranks)


def left_behind(numbers: Mapping[str, np.ndarray]) -> tuple[str, ...]:
    """Optimizer states of parameters that had gradients in fewer iterations than others: a flat shard counts for all.

    A growing network has such, in layers of the resolution that it has left. Without momentum their weights stay.
    """
    steps = {key: float(value) for key, value in numbers.items() if key.endswith("/step")}
    return tuple(key.removesuffix("step") for key, value in steps.items() if value < max(steps.values()))


def check_traffic(cell: Cell, numbers: Mapping[str, np.ndarray], ranks: int) -> None:
    """ddp sends every gradient once a phase, whatever the number of micro-batches; shards are sent more often."""
    players = Training(cell.twin, Group(), seed=0).strategy.players
    used = {key.removeprefix("optimizer/").rsplit("/", 1)[0] for key in numbers if key.startswith("optimizer/")}
    nbytes = sum(
        parameter.nbytes
        for player, module in players.items()
        for key, parameter in module.named_parameters()
        if f"{player}/{key}" in used
    )
    sent, collectives = (float(numbers[f"traffic/dist/{what}_per_step"]) for what in ("bytes", "collectives"))
    if cell.distributed.strategy == "ddp":
        assert sent == nbytes
        assert collectives == 2 if cell.distributed.bucket_mib > 1 else collectives > 6
    else:  # gathered and summed at least once each
        assert sent >= 2 * nbytes and collectives >= 4
    assert ranks > 1


def of(stored: Mapping[str, np.ndarray], name: str) -> dict[str, np.ndarray]:
    return {key.removeprefix(f"{name}:"): value for key, value in stored.items() if key.startswith(f"{name}:")}


def close(value: np.ndarray, expected: np.ndarray, tolerance: float, what: str) -> None:
    error = float(np.abs(value - expected).max(initial=0.0)) / max(float(np.abs(expected).max(initial=0.0)), 1e-12)
    assert error <= tolerance, f"{what}: {error:.2e}"
