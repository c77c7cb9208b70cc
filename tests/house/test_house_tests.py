"""Folders of tests can be named together in one pytest call: modules are imported by their bare names."""

from __future__ import annotations

import fnmatch
import tomllib
from collections import Counter
from pathlib import Path

import house_rules as rules
import pytest

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


def test_no_folder_of_tests_is_passed_over(pytestconfig: pytest.Config) -> None:
    """pytest leaves out folders by name; one called `dist` would never be run unless it is named."""
    patterns = pytestconfig.getini("norecursedirs")
    folders = {part for path in TESTS.rglob("test_*.py") for part in path.relative_to(TESTS).parts[:-1]}
    assert "dist" in folders
    assert not [name for name in folders for pattern in patterns if fnmatch.fnmatch(name, pattern)]


def test_no_folder_is_passed_over_by_ruff() -> None:
    """Its own list of what to leave out has `dist`, too; a list in its settings takes that one's place."""
    settings = tomllib.loads((TESTS.parent / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["ruff"]
    folders = {part for path in TESTS.rglob("*.py") for part in path.relative_to(TESTS.parent).parts[:-1]}
    assert "dist" in folders
    assert not [name for name in folders for pattern in settings["exclude"] if fnmatch.fnmatch(name, pattern)]
