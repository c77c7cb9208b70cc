"""Each phase's gradient, the terms and the weights after three iterations do not depend on the number of ranks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from launching import accelerate_launch
from probe_strategies import CORNER
from probe_training import collect
from strategy_cells import check_cells

from sivae_dist.distributed.group import Group

TOLERANCE = 1e-9  # relative to the largest entry of the array, float64


@pytest.fixture(scope="module")
def alone() -> dict[str, np.ndarray]:
    return collect(Group())


@pytest.mark.dist
@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_several_ranks_equal_one(ranks: int, alone: dict[str, np.ndarray], tmp_path: Path) -> None:
    file = tmp_path / "numbers.npz"
    done = accelerate_launch(ranks, str(Path(__file__).with_name("probe_training.py")), str(file), str(ranks))
    assert done.returncode == 0, done.stdout + done.stderr
    stored = dict(np.load(file))
    together = {name: value for name, value in stored.items() if ":" not in name}
    assert set(together) == set(alone)
    assert_recomputed_equal(together)
    for name, expected in alone.items():
        scale = max(float(np.abs(expected).max(initial=0.0)), 1e-12)
        # A bias in front of a normalisation has gradient zero but for rounding.
        floor = max(scale, 1e-4) if "gradient" in name else scale
        error = float(np.abs(together[name] - expected).max(initial=0.0)) / floor
        assert error <= TOLERANCE, f"{name}: {error:.2e}"
    check_cells(stored, CORNER, ranks)


def assert_recomputed_equal(numbers: dict[str, np.ndarray]) -> None:
    """Blocks that are computed twice change nothing, bit for bit."""
    for case in ("soft", "style"):
        names = [name for name in numbers if name.startswith(f"{case}/")]
        assert names
        for name in names:
            assert np.array_equal(numbers[name], numbers[name.replace(case, f"{case}-recomputed", 1)]), name


def test_recomputed_blocks_change_nothing(alone: dict[str, np.ndarray]) -> None:
    assert_recomputed_equal(alone)


def test_decoding_once_changes_nothing(alone: dict[str, np.ndarray]) -> None:
    """On any number of ranks, with the above: gradients bit for bit, weights and statistics up to rounding."""
    for case in ("soft", "introvae"):
        names = [name for name in alone if name.startswith(f"{case}/")]
        assert names
        for name in names:
            once = alone[name.replace(case, f"{case}-once", 1)]
            np.testing.assert_allclose(once, alone[name], rtol=1e-12, atol=1e-12, err_msg=name)


def test_the_comparison_sees_a_wrong_gradient(alone: dict[str, np.ndarray]) -> None:
    """Gradients of different iterations differ by far more than the tolerance, so equality above says something."""
    first = alone["soft/gradient0/encoder/encoder.head.weight"]
    second = alone["soft/gradient1/encoder/encoder.head.weight"]
    assert np.abs(first - second).max() > 1e-3 * np.abs(first).max()
