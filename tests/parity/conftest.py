"""Precision of the comparisons, and the account of which recorded arrays were compared."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parent
PARTIAL = pytest.StashKey[bool]()  # whether some parity tests were deselected


@pytest.fixture(params=["float64", "float32"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """Double compares tightly, single more loosely."""
    return {"float64": torch.float64, "float32": torch.float32}[request.param]


@pytest.fixture(autouse=True)
def one_thread(request: pytest.FixtureRequest) -> Iterator[None]:
    """Small networks lose more than they gain from threads; the full-size ones keep them."""
    before = torch.get_num_threads()
    if request.path.stem != "test_fullsize":
        torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _mine(item: pytest.Item) -> bool:
    return item.path.parent == HERE


def pytest_deselected(items: list[pytest.Item]) -> None:
    for item in filter(_mine, items):
        item.config.stash[PARTIAL] = True


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Puts the account behind all tests it speaks about, or takes it out when only a part of them was selected.

    Also takes out the placeholders of families that the fixture folder does not hold.
    """
    mine = [item for item in items if _mine(item)]
    complete = {item.path for item in mine} == set(HERE.glob("test_*.py"))
    complete &= not config.stash.get(PARTIAL, False) and not any("::" in argument for argument in config.args)
    absent = [item for item in mine if _placeholder(item)]
    account = [item for item in mine if item.path.stem == "test_accounting"]
    dropped = absent if complete else absent + account
    items[:] = [item for item in items if item not in dropped and item not in account] + account * complete
    if dropped:
        config.hook.pytest_deselected(items=dropped)


def _placeholder(item: pytest.Item) -> bool:
    reasons = (str(mark.kwargs.get("reason", "")) for mark in item.iter_markers("skip"))
    return any(reason.startswith("got empty parameter set") for reason in reasons)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    from golden_files import files

    if terminalreporter.config.getoption("numprocesses", None):
        return  # another process has compared them
    every = sum(len(golden.arrays) for golden in files().values())
    used = sum(len(golden.used) for golden in files().values())
    terminalreporter.write_line(f"parity: compared {used} of {every} arrays")
