"""A training killed right before any change that it makes on the disk ends as an undisturbed one when it goes on."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from commands import Runner, write_config

pytestmark = pytest.mark.slow

MEASURED = ("time/", "mem/")


@pytest.fixture
def frugal(packed: Path, tmp_path: Path) -> Path:
    """Two checkpoints and the last one, of which one is kept; grids; measures; the position of every file moves."""
    return write_config(
        tmp_path / "frugal.yaml",
        packed,
        train={"kimg": 0.08},
        checkpoint={"every_kimg": 0.03, "keep_last": 1},
        tracking={"images_every_kimg": 0.04},
        eval={"every_kimg": 0.05},
    )


def end_of(run: Path) -> tuple[list[dict[str, Any]], dict[str, bytes]]:
    """Its rows without times, and the bytes of the last checkpoint's tensors."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = run / "checkpoints" / (run / "checkpoints/latest").read_text().strip()
    return (
        [{key: value for key, value in row.items() if not key.startswith(MEASURED)} for row in rows],
        {path.name: path.read_bytes() for path in sorted(last.glob("*.safetensors"))},
    )


def names(run: Path) -> set[str]:
    """What lies there, apart from the log and TensorBoard's files, which every start adds to."""
    found = {str(path.relative_to(run)) for path in run.rglob("*")}
    return {name for name in found if not name.startswith(("tensorboard/", "logs/"))}


@pytest.mark.timeout(1200)
def test_before_every_step(run: Runner, frugal: Path, tmp_path: Path) -> None:
    command = ("train", "--config", frugal, "--out")
    assert run(*command, tmp_path / "clean").status == 0
    rows, tensors = end_of(tmp_path / "clean")
    tidy, folder = names(tmp_path / "clean"), tmp_path / "run"
    step, status = 0, -signal.SIGKILL
    while status:
        step += 1
        shutil.rmtree(folder, ignore_errors=True)
        status = run(*command, folder, dies_before=[step, str(folder)]).status
        assert status in (0, -signal.SIGKILL)
        done = run(*command, folder)
        assert done.status == 0, (step, done)
        assert end_of(folder) == (rows, tensors), f"killed before step {step}"
        # Killed right before the last checkpoint but one is deleted, it is complete and stays, a folder more.
        more = {name for name in names(folder) - tidy if not name.startswith("checkpoints/nimg-")}
        assert not more and names(folder) >= tidy, f"killed before step {step}"
    assert step > 40
