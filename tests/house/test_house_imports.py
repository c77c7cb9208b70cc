"""Importing the package is quick and quiet: heavy or optional libraries wait until they are used."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LATE = ["deepspeed", "webdataset", "tensorboard"]


def late_modules_after(statement: str, extra_path: Path | None = None) -> list[str]:
    """Which of LATE are loaded once `statement` ran in a fresh interpreter."""
    code = f"import sys; sys.path[:0] = {[str(p) for p in (extra_path, ROOT) if p]!r}; {statement}; "
    code += f"print([m for m in {LATE!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300)
    return [name for name in LATE if repr(name) in done.stdout]


def test_importing_the_package_loads_no_heavy_library() -> None:
    assert late_modules_after("import sivae_dist") == []


@pytest.mark.parametrize("name", LATE)
def test_the_check_sees_a_heavy_library(tmp_path: Path, name: str) -> None:
    (tmp_path / f"{name}.py").write_text("")
    assert late_modules_after(f"import {name}", tmp_path) == [name]
