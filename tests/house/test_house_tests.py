"""Folders of tests can be named together in one pytest call: modules are imported by their bare names."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import house_rules as rules

TESTS = Path(__file__).resolve().parents[1]


def test_no_two_modules_share_a_name() -> None:
    """pytest itself keeps the conftest files apart, and nothing else."""
    names = Counter(path.stem for path in TESTS.rglob("*.py") if path.stem != "conftest")
    assert not [name for name, count in names.items() if count > 1]


def test_helpers_are_not_imported_from_a_conftest() -> None:
    """`conftest` is the one that was loaded last, so which it is depends on what else is collected."""
    found = [
        f"{path}:{line}"
        for path in TESTS.rglob("*.py")
        for line, module in rules.imported(rules.parse(path), path, TESTS.parent)
        if module.split(".")[0] == "conftest"
    ]
    assert not found
