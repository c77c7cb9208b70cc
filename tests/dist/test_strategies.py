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
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_every_cell(ranks: int, tmp_path: Path) -> None:
    """One launch a number of ranks; four are for hybrid sharding alone."""
    names = [name for name in CELLS if (name in FOUR_RANKS) == (ranks == 4)]
    file = tmp_path / "numbers.npz"
    probe = str(Path(__file__).with_name("probe_strategies.py"))
    done = accelerate_launch(ranks, probe, str(file), str(ranks), *names, timeout=850)
    assert done.returncode == 0, done.stdout + done.stderr
    check_cells(dict(np.load(file)), names, ranks)
