"""What training took, as reported: counted over restarts and rollbacks, known or left out. Time itself is made up."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from memory_data import MemoryConfig

import sivae_dist
from sivae_dist.engine import checkpoint
from sivae_dist.engine.clock import Clock
from sivae_dist.engine.config import RunConfig, from_dict
from sivae_dist.engine.iteration import Iteration
from sivae_dist.models.residual import ResidualConfig

BATCH, ITERATIONS = 4, 6
WALL, CPU = 2.0, 3.0  # an iteration reads the time three times, one second apart; CPU time twice, three apart


@pytest.fixture(autouse=True)
def ticking(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every look at the time finds it a second later, at the CPU time three seconds."""
    wall, cpu = itertools.count(100.0, 1.0), itertools.count(7.0, 3.0)
    fake = SimpleNamespace(perf_counter=lambda: next(wall), process_time=lambda: next(cpu))
    monkeypatch.setattr("sivae_dist.engine.clock.time", fake)


def settings(**sections: Any) -> RunConfig:
    each = BATCH / 1000
    values = {
        "train": {"kimg": each * ITERATIONS, "batch": BATCH},
        "checkpoint": {"every_kimg": each, "keep_last": 20},
        "tracking": {"every_kimg": each, "images_every_kimg": 0, "progress": False, "tensorboard": False},
        "eval": {"every_kimg": 2 * each, "images": 4},
    }
    model = ResidualConfig.tiny()
    return replace(from_dict({**values, **sections}, "test"), model=model, data=MemoryConfig.of(model.build()))


def totals(run: Path) -> list[tuple[float, ...]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [tuple(row.get(key, -1.0) for key in ("nimg", "time/train_s", "time/cpu_s")) for row in rows]


def expected(first: int, last: int) -> list[tuple[float, ...]]:
    """A report after every iteration, an evaluation after every other one (and before the first)."""
    done = [n for n in range(first, last + 1) for _ in range(2 if n % 2 == 0 and n else 1)]
    return [(n * BATCH, n * WALL, n * CPU) for n in done]


def test_every_row_tells_and_a_resumed_run_goes_on(tmp_path: Path) -> None:
    whole = sivae_dist.train(settings(), tmp_path / "whole")
    assert totals(whole) == expected(0, ITERATIONS)
    start = whole / "checkpoints" / checkpoint.name_of(3 * BATCH)
    resumed = sivae_dist.train(settings(), tmp_path / "resumed", str(start))
    assert totals(resumed) == expected(4, ITERATIONS)


def test_what_is_rolled_back_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    call = Iteration.__call__

    def spoilt(self: Iteration, batch: Any, *, nimg: int, **options: Any) -> Any:
        if nimg >= 2 * BATCH and self.salt == 0:
            batch.x.fill_(math.nan)
        return call(self, batch, nimg=nimg, **options)

    monkeypatch.setattr(Iteration, "__call__", spoilt)
    run = sivae_dist.train(settings(guard={"patience": 3}), tmp_path / "run")
    assert json.loads((run / "metrics.jsonl").read_text().splitlines()[-2])["guard/rollbacks"] == 1
    assert totals(run) == expected(0, ITERATIONS)


def test_a_checkpoint_that_does_not_tell_leaves_the_total_out(tmp_path: Path) -> None:
    whole = sivae_dist.train(settings(), tmp_path / "whole")
    old = checkpoint.read(whole / "checkpoints" / checkpoint.name_of(3 * BATCH))
    del old.state["clock"], old.state["format"], old.state["nimg"]
    start = checkpoint.write(tmp_path / "old", old)
    resumed = sivae_dist.train(settings(), tmp_path / "resumed", str(start))
    assert {row[1:] for row in totals(resumed)} == {(-1.0, -1.0)}
    state = checkpoint.read(resumed / "checkpoints" / checkpoint.name_of(6 * BATCH)).state
    assert state["clock"] == {}


def test_waiting_for_the_next_batch_within_an_iteration_counts_as_waiting() -> None:
    clock = Clock()
    clock.begin()
    clock.data_arrived()  # 1 s
    with clock.waiting():  # 1 s
        pass
    clock.end(4)  # 4 s in all
    assert clock.read()["time/data_wait_fraction"] == 2 / 4
