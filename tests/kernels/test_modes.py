"""Which implementation runs, by configuration and environment, and what happens when it cannot be had."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sivae_dist.errors import UserError
from sivae_dist.models import ModelConfig
from sivae_dist.models.mlp import MlpConfig
from sivae_dist.models.modulated import ModulatedConfig
from sivae_dist.ops import kernels, setup_filter, upfirdn2d
from sivae_dist.ops._toolchain import UnavailableError
from sivae_dist.registry import components

ROOT = Path(__file__).resolve().parents[2]
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    yield
    kernels.configure(kernels.KernelConfig(), CPU)


@pytest.fixture
def nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """No kernels can be had."""

    def refuse(device: str) -> None:
        raise UnavailableError(f"there is no {device} compiler", "install one")

    monkeypatch.setattr(kernels, "load", refuse)


def test_auto_leaves_cpu_tensors_to_the_reference() -> None:
    facts = kernels.configure(kernels.KernelConfig(), CPU)
    assert facts == {"mode": "auto", "running": "reference"} and not kernels.selected(torch.ones(1))


def test_cpu_says_what_it_was_made_of() -> None:
    facts = kernels.configure(kernels.KernelConfig("cpu"), CPU)
    assert facts["running"] == "cpu" and len(str(facts["build"])) == 16
    assert kernels.selected(torch.ones(1)) and not kernels.selected(torch.ones(1, device="meta"))
    assert not kernels.selected(torch.ones(1, dtype=torch.int32))


def test_the_environment_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SIVAE_KERNELS", "reference")
    assert kernels.configure(kernels.KernelConfig("cpu"), CPU)["running"] == "reference"
    monkeypatch.setenv("SIVAE_KERNELS", "fast")
    with pytest.raises(UserError, match="SIVAE_KERNELS is 'fast'"):
        kernels.configure(kernels.KernelConfig(), CPU)
    monkeypatch.delenv("SIVAE_KERNELS")


def test_an_explicit_mode_on_the_wrong_device() -> None:
    with pytest.raises(UserError, match="the run is on cpu"):
        kernels.configure(kernels.KernelConfig("cuda"), CPU)
    with pytest.raises(UserError, match="the run is on cuda"):
        kernels.configure(kernels.KernelConfig("cpu"), CUDA)


def test_what_cannot_be_had(nothing: None, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(UserError, match=r"kernels\.mode is cpu, but there is no cpu compiler"):
        kernels.configure(kernels.KernelConfig("cpu"), CPU)
    with pytest.raises(UserError, match=r"kernels\.mode is cuda"):
        kernels.configure(kernels.KernelConfig("cuda"), CUDA)
    with caplog.at_level(logging.WARNING, logger="sivae_dist"):
        assert kernels.configure(kernels.KernelConfig("auto"), CUDA)["running"] == "reference"
        assert not any(kernels.serves("cuda") for _ in range(3))
    assert len([r for r in caplog.records if "plain PyTorch: there is no cuda compiler" in r.message]) == 1


def test_auto_builds_nothing_for_networks_without_fused_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU; an explicit mode still says at once what cannot be had."""
    asked: list[str] = []

    def refuse(device: str) -> None:
        asked.append(device)
        raise UnavailableError("there is no compiler", "install one")

    monkeypatch.setattr(kernels, "load", refuse)
    points, pictures = MlpConfig(), ModulatedConfig()
    facts = kernels.configure(kernels.KernelConfig("auto"), CUDA, used=points.fused_operators)
    assert facts == {"mode": "auto", "running": "none needed"} and asked == []
    assert kernels.configure(kernels.KernelConfig(), CUDA, used=pictures.fused_operators)["running"] == "reference"
    assert asked == ["cuda"]
    with pytest.raises(UserError, match="no compiler"):
        kernels.configure(kernels.KernelConfig("cuda"), CUDA, used=points.fused_operators)


@pytest.mark.parametrize("name", ["mlp", "residual", "style", "modulated"])
def test_networks_say_whether_they_call_fused_operators(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What they say is what they do: every operator asks whether kernels serve its map."""
    asked: list[Tensor] = []
    monkeypatch.setattr(kernels, "selected", lambda x: bool(asked.append(x)))
    config: Any = components("sivae_dist.models", ModelConfig)[name].tiny()  # type: ignore[attr-defined]
    model = config.build()
    with torch.no_grad():
        model.encode(torch.zeros(2, *model.sample_shape))
        model.decode(torch.zeros(2, *model.prior.shape))
    assert bool(asked) == config.fused_operators


def test_a_process_without_a_compiler(tmp_path: Path) -> None:
    """auto trains on; an explicit mode ends with what is missing and the remedy, and no attempt is repeated."""
    code = "\n".join([
        "import torch; from sivae_dist.ops import upfirdn2d, kernels; from sivae_dist.errors import UserError",
        "print(upfirdn2d(torch.ones(1, 1, 2, 2), None, 2).sum().item())",
        "for _ in range(2):",
        "    try:",
        "        with kernels.using('cpu'): upfirdn2d(torch.ones(1, 1, 2, 2), None, 2)",
        "    except UserError as error: print(error)",
    ])  # fmt: skip
    env = {"PATH": str(tmp_path), "PYTHONPATH": str(ROOT), "SIVAE_KERNEL_CACHE": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True, timeout=120
    )
    first, *told = done.stdout.splitlines()
    assert first == "4.0" and done.stderr == ""
    assert told == 2 * [
        "kernels.mode is cpu, but there is no C++ compiler (c++, g++, clang++ is not found)",
        "  fix: install one (Debian, Ubuntu: apt install g++), or set CXX to a working one",
    ]


def test_both_modes_compute_the_same() -> None:
    x, f = torch.randn(2, 3, 8, 8), setup_filter([1, 3, 3, 1])
    plain = upfirdn2d(x, f, 2, 1, (2, 1))
    with kernels.using("cpu"):
        fused = upfirdn2d(x, f, 2, 1, (2, 1))
    torch.testing.assert_close(plain, fused)
    assert plain.equal(upfirdn2d(x, f, 2, 1, (2, 1)))


def test_a_network_trains_alike_in_both_modes() -> None:
    """Losses of a whole encoder and decoder, and all gradients, agree to rounding."""
    config = ModulatedConfig(image_size=16, channel_base=128, channel_max=16, latent_size=16, mapping_layers=2)
    torch.manual_seed(0)
    model, x = config.build().eval(), torch.randn(2, 3, 16, 16)
    results = []
    for mode in ("reference", "cpu"):
        model.zero_grad()
        with kernels.using(mode):  # type: ignore[arg-type]
            torch.manual_seed(1)  # of the noise maps
            posterior = model.encode(x)
            loss = (model.decode(posterior.mu) - x).square().sum() + posterior.logvar.square().sum()
        loss.backward()
        results.append([loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    assert len(results[0]) == len(results[1]) > 20
    for plain, fused in zip(*results, strict=True):
        torch.testing.assert_close(fused, plain, rtol=1e-4, atol=1e-5 * max(1.0, float(plain.abs().max())))
