"""What `sivae-dist doctor` says about kernels."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sivae_dist.apps.checks import kernels as look
from sivae_dist.apps.checks.base import Check
from sivae_dist.ops import _ahead
from sivae_dist.ops import kernels as ops


def found(device: str = "cpu") -> Check:
    return {check.name: check for check in look.kernels()}[f"kernels, {device}"]


def test_built_or_to_be_built(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ops.load("cpu")
    assert found().status == "ok" and "kernels.so" in found().found and "use plain PyTorch" in found().found
    monkeypatch.setenv("SIVAE_KERNEL_CACHE", str(tmp_path / "empty"))
    assert f"will be built on first use, with c++ into {tmp_path}" in found().found
    assert not (tmp_path / "empty").exists()


def test_missing_compiler_matters_to_who_would_use_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "nowhere")
    assert found().status == "ok" and "cannot be built" in found().found
    monkeypatch.setenv("SIVAE_KERNELS", "cpu")
    assert found().status == "warning" and "passes over memory" in found().found and "CXX" in found().remedy


def test_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.version, "cuda", "11.8")
    monkeypatch.setenv("CUDA_HOME", "/nowhere")
    assert found("cuda").status == "warning" and "CUDA 11.8" in found("cuda").remedy


def test_ahead_of_time(monkeypatch: pytest.MonkeyPatch) -> None:
    built = ops.load("cpu")
    monkeypatch.setattr(_ahead, "find", lambda device: built if device == "cpu" else None)
    assert "built ahead of time" in found().found


def test_wrong_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SIVAE_KERNELS", "quick")
    (check,) = look.kernels()
    assert check.status == "warning" and "quick" in check.found
