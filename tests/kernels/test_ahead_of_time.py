"""`SIVAE_BUILD_KERNELS=1 pip install --no-build-isolation .`: the wheel holds the kernels, and they are used."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from lanes import devices

from sivae_dist.ops import _ahead, kernels
from sivae_dist.ops._toolchain import _gencode_words, digest
from sivae_dist.resources import kernels_dir

ROOT = Path(__file__).resolve().parents[2]

USE = """
import json, torch, sivae_dist
from sivae_dist.ops import kernels, upfirdn2d
with kernels.using("cpu"):
    x = torch.randn(1, 2, 5, 5)
    fused = upfirdn2d(x, torch.ones(4), 2, 1, 3)
print(json.dumps([str(kernels.load("cpu").library), (fused - upfirdn2d(x, torch.ones(4), 2, 1, 3)).abs().max().item()]))
import sivae_dist._C
"""


@pytest.mark.slow
@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA: _C holds the CUDA kernels, if any")
def test_an_installation_uses_its_own_library(tmp_path: Path) -> None:
    source, site = tmp_path / "source", tmp_path / "site"
    source.mkdir()
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    for name in ("sivae_dist", "configs", "kernels"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "_C.*"))
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--quiet"]
    env = {**os.environ, "SIVAE_BUILD_KERNELS": "1"}
    subprocess.run([*pip, "--wheel-dir", tmp_path, source], env=env, check=True, timeout=300)
    (wheel,) = tmp_path.glob("*.whl")
    assert "linux" in wheel.name  # not "any": it holds compiled code
    names = zipfile.ZipFile(wheel).namelist()
    assert {"sivae_dist/_C.abi3.so", "sivae_dist/_C.json", "sivae_dist/_kernels/upfirdn2d/upfirdn2d.cu"} <= set(names)
    subprocess.run(
        [*pip[:3], "install", *pip[4:], "--target", site, wheel], check=True, timeout=300, cwd=tmp_path, env=os.environ
    )
    # No compiler on the path, no cache: only the library in the package can serve.
    alone = {"PATH": str(tmp_path), "PYTHONPATH": str(site), "SIVAE_KERNEL_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", USE], env=alone, capture_output=True, text=True, check=False, timeout=120, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    library, difference = json.loads(done.stdout)
    assert Path(library) == site / "sivae_dist" / _ahead.NAME and difference < 1e-4


@pytest.mark.parametrize(
    ("change", "fits"),
    [({}, True), ({"sources": "0" * 16}, False), ({"torch": "2.0.0"}, False), ({"cuda": "1.0"}, False), (None, False)],
)
def test_a_library_that_does_not_fit_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, str] | None, fits: bool
) -> None:
    monkeypatch.setattr(_ahead, "PACKAGE", tmp_path)
    assert _ahead.find("cpu") is None
    (tmp_path / _ahead.NAME).write_bytes(b"library")
    facts = {"sources": digest(kernels_dir()), "torch": torch.__version__, "cuda": str(torch.version.cuda)}
    record = {"device": "cpu", "key": "k", "facts": {**facts, **(change or {})}}
    (tmp_path / _ahead.RECORD).write_text("{" if change is None else json.dumps(record))
    assert (_ahead.find("cpu") is not None) == fits
    assert _ahead.find("cuda") is None


@pytest.mark.parametrize(
    ("codes", "here", "fits"),
    [
        ("80;90+PTX", [], True),  # nothing to run on
        ("80;90+PTX", [(8, 0), (8, 9), (9, 0), (12, 0)], True),
        ("80;90+PTX", [(9, 0), (7, 5)], False),
        ("86", [(8, 0)], False),
        ("80", [(9, 0)], False),
        ("75+PTX", [(9, 0), (7, 0)], False),
        ("90a+PTX", [(9, 0)], True),
        ("90a+PTX", [(10, 0)], False),
        ("100f+PTX", [(10, 3)], True),
        ("100f+PTX", [(12, 0)], False),
    ],
)
def test_a_library_without_code_for_a_device_is_left_alone(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    codes: str,
    here: list[tuple[int, int]],
    fits: bool,
) -> None:
    """Its first launch would fail with "no kernel image is available"."""
    devices(monkeypatch, here)
    monkeypatch.setattr(_ahead, "PACKAGE", tmp_path)
    (tmp_path / _ahead.NAME).write_bytes(b"library")
    facts = {"sources": digest(kernels_dir()), "torch": torch.__version__, "cuda": str(torch.version.cuda)}
    facts["flags"] = "-O3 " + " ".join(_gencode_words(codes))
    (tmp_path / _ahead.RECORD).write_text(json.dumps({"device": "cuda", "key": "k", "facts": facts}))
    with caplog.at_level("INFO"):
        assert (_ahead.find("cuda") is not None) == fits
    assert ("does not run on the device here" in caplog.text) != fits


def test_what_the_library_was_built_from_counts_not_what_it_is_called() -> None:
    assert kernels.load("cpu").facts["sources"] == digest(kernels_dir())
