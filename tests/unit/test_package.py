"""The names at the top of the package, whatever was imported before."""

from __future__ import annotations

import importlib
import subprocess
import sys
from typing import Any

import pytest

import sivae_dist
from sivae_dist.cli import commands, main


def test_train_stays_callable_once_the_module_of_that_name_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    """`python -m sivae_dist.train` needs a module, and a submodule becomes an attribute of its package."""
    calls: list[Any] = []
    monkeypatch.setattr("sivae_dist.engine.run.train", lambda *a, **k: calls.append((a, k)) or "folder")
    module = importlib.import_module("sivae_dist.train")
    monkeypatch.setattr(sivae_dist, "train", module, raising=False)  # as right after the import
    assert sivae_dist.train("config", "out", dry_run=True) == "folder"
    monkeypatch.delattr(sivae_dist, "train")
    assert sivae_dist.train("config", "other") == "folder"
    assert calls == [(("config", "out"), {"dry_run": True}), (("config", "other"), {})]
    assert callable(module.main)


def test_in_a_fresh_interpreter() -> None:
    code = "import sivae_dist, sivae_dist.train; sivae_dist.train()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert "train() missing 2 required positional arguments: 'config' and 'out'" in done.stderr


@pytest.mark.parametrize("words", [["data"], ["data", "--help"], ["bench", "-h"], ["checkpoint"]])
def test_a_group_of_commands_tells_its_commands(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    main(words)
    said = capsys.readouterr().out
    assert said.startswith(f"usage: sivae-dist {words[0]} COMMAND")
    rows = said.split("\n\n", 1)[1].splitlines()
    assert rows and all(row.startswith(f"  {words[0]} ") for row in rows)
    assert len(rows) == sum(name.startswith(f"{words[0]} ") for name in commands())
