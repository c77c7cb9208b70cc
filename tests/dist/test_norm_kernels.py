"""Synchronised batch norm inside the fused norm_act: several ranks give what one process gives, statistics too."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from launching import accelerate_launch
from probe_norm_kernels import NAMES
from probe_training import run

from sivae_dist.distributed.group import Group
from sivae_dist.ops import kernels

pytestmark = [pytest.mark.dist, pytest.mark.slow]

CACHE = Path(__file__).resolve().parents[2] / "build" / "kernels"


@pytest.fixture(scope="module")
def cache() -> str:
    """Built before ranks start, which would else wait for a compiler."""
    with pytest.MonkeyPatch.context() as patch:
        where = os.environ.get("SIVAE_TEST_KERNEL_CACHE", str(CACHE))
        patch.setenv("SIVAE_KERNEL_CACHE", where)
        kernels.load("cpu")
    return where


def trained(ranks: int, mode: str, cache: str, folder: Path) -> dict[str, np.ndarray]:
    file, script = folder / f"{mode}-{ranks}.npz", str(Path(__file__).with_name("probe_norm_kernels.py"))
    done = accelerate_launch(ranks, script, str(file), str(ranks), mode, env={"SIVAE_KERNEL_CACHE": cache})
    assert done.returncode == 0, done.stdout + done.stderr
    return dict(np.load(file))


def compare(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray], tolerance: float) -> None:
    assert set(found) == set(wanted) and any("running_var" in name for name in wanted)
    for name, expected in wanted.items():
        scale = max(float(np.abs(expected).max(initial=0.0)), 1e-12)
        floor = max(scale, 1e-4) if "gradient" in name else scale  # of a bias before a norm only rounding is left
        error = float(np.abs(found[name] - expected).max(initial=0.0)) / floor
        assert error <= tolerance, f"{name}: {error:.2e}"


def test_two_ranks_equal_one_process(cache: str, tmp_path: Path) -> None:
    """By the kernels; and where one rank has them and the other has not, as plain PyTorch on one process."""
    alone = trained(1, "cpu", cache, tmp_path)
    compare(trained(2, "cpu", cache, tmp_path), alone, 1e-9)
    plain = {name: value for case in NAMES for name, value in run(case, Group())}
    compare(trained(2, "mixed", cache, tmp_path), plain, 1e-9)
    compare(alone, plain, 1e-9)
