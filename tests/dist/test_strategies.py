"""Every strategy trains what one process trains: states, terms and norms of tiny networks, a restore in between."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from launching import accelerate_launch
from probe_strategies import CELLS, FOUR_RANKS
from strategy_cells import check_cells


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "deepspeed"])
def test_every_cell(strategy: str, ranks: int, tmp_path: Path) -> None:
    """One launch for all cells of a strategy, with what it is compared with on as many ranks."""
    names = [name for name in CELLS if name.startswith((strategy, "ddp/bf16", "ddp/fp16")) and name not in FOUR_RANKS]
    launch_and_check(names, ranks, tmp_path)


@pytest.mark.dist
@pytest.mark.slow
def test_copies_of_shards(tmp_path: Path) -> None:
    launch_and_check(list(FOUR_RANKS), 4, tmp_path)


def launch_and_check(names: list[str], ranks: int, folder: Path) -> None:
    file = folder / "numbers.npz"
    probe = str(Path(__file__).with_name("probe_strategies.py"))
    done = accelerate_launch(ranks, probe, str(file), str(ranks), *names, timeout=850)
    assert done.returncode == 0, done.stdout + done.stderr
    check_cells(dict(np.load(file)), names, ranks)
