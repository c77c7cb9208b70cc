"""What cells of probe_strategies.py must agree with, and how closely."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping

import numpy as np
import torch
from probe_strategies import CELLS, Cell, Training, run

from sivae_dist.distributed.group import Group

# Relative to the largest entry of an array, against one process that trains on the global batch. In float32 a sum's
# order shows; Adam's large eps keeps it from growing. In bfloat16 it shows in the third digit of every activation.
TOLERANCE = {"fp64": 1e-9, "fp32": 2e-4, "bf16": 5e-2}
# In bfloat16, whole states against `ddp` on as many ranks, which rounds the same sums of the same activations.
SAME_RANKS = 1e-3


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
        for key, value in expected.items():
            # An average over micro-batches, whose images depend on the number of ranks.
            micro = cell.accumulation > 1 and key.endswith("dlatent_avg")
            if not micro and (cell.dtype != "bf16" or key.startswith(("term", "norm"))):
                close(numbers[key], value, TOLERANCE[cell.dtype], f"{name} on {ranks} ranks: {key}")
        if cell.dtype == "bf16" and cell.distributed.strategy != "ddp":
            twin = of(stored, "/".join(["ddp", *name.split("/")[1:]]))
            for key in expected:
                close(numbers[key], twin[key], SAME_RANKS, f"{name} on {ranks} ranks, against ddp: {key}")
        if cell.distributed.overlap:  # the same buckets: the same bits
            assert numbers["traffic/early"] > 4, name  # from the second iteration on
            twin = of(stored, name.replace("overlap", "late"))
            for key in expected:
                assert np.array_equal(numbers[key], twin[key]), f"{name} on {ranks} ranks, against no overlap: {key}"
        check_traffic(cell, numbers, ranks)


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
