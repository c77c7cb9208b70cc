"""Precision of the comparisons, and the account of which recorded arrays were compared."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parent
PARTIAL = pytest.StashKey[str]()


@pytest.fixture(params=["float64", "float32"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """Double compares tightly, single more loosely."""
    return {"float64": torch.float64, "float32": torch.float32}[request.param]


def _mine(item: pytest.Item) -> bool:
    return item.path.parent == HERE


def pytest_deselected(items: list[pytest.Item]) -> None:
    for item in filter(_mine, items):
        item.config.stash[PARTIAL] = "some were deselected"


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Moves the account behind all tests it speaks about, and notes whether it can speak."""
    items.sort(key=lambda item: _mine(item) and item.path.stem == "test_accounting")
    collected = {item.path.stem for item in items if _mine(item)}
    missing = {path.stem for path in HERE.glob("test_*.py")} - collected
    if missing:
        config.stash[PARTIAL] = f"without {', '.join(sorted(missing))}"
    if any("::" in argument for argument in config.args):
        config.stash[PARTIAL] = "single tests were named"


@pytest.fixture
def partial(request: pytest.FixtureRequest) -> str:
    """Why the account is incomplete, empty when it is complete."""
    return request.config.stash.get(PARTIAL, "")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    from golden_files import files

    every = sum(len(golden.arrays) for golden in files().values())
    used = sum(len(golden.used) for golden in files().values())
    terminalreporter.write_line(f"parity: compared {used} of {every} arrays")
