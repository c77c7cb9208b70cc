"""`sivae-dist bench kernels`: the report is complete, costs are those of the formula, failures are told."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
import torch

from sivae_dist.apps.bench import core
from sivae_dist.apps.bench import kernels as bench
from sivae_dist.cli import main
from sivae_dist.ops import kernels

CPU = torch.device("cpu")


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Small sets of inputs, a small copy: what is measured is not the point."""
    monkeypatch.setattr(core, "_BEYOND_CACHES", 1 << 10)
    monkeypatch.setattr(core, "ceiling", lambda device, dtype: core.Ceiling(1e10, 1e11))
    monkeypatch.setattr(bench, "ceiling", lambda device, dtype: core.Ceiling(1e10, 1e11))
    yield
    assert kernels.mode() == "auto"


def test_command(few: None, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--device", "cpu", "--no-compile", "--batch", "1", "--seconds", "0.01", "--only", "256 px up"]
    main(["bench", "kernels", *options, "--json"])
    told = json.loads(capsys.readouterr().out)
    assert told["precision"] == "fp32" and len(told["cases"]) == 4
    for row in told["cases"]:
        assert row["operator"] == "upfirdn2d" and row["ms"]["kernel"] > 0 and row["speedup"]["eager"] > 0
        assert row["failed"] == {}
    up = told["cases"][0]
    assert up["bytes"] == 4 * 64 * (128**2 + 256**2) and up["flops"] == 2 * 4 * 64 * 256**2
    assert up["of_copy_bandwidth"] == pytest.approx(up["bytes"] / (up["ms"]["kernel"] / 1e3) / 1e10)
    main(["bench", "kernels", *options])
    assert "upfirdn2d 256 px up 1x64x128x128 + backward" in capsys.readouterr().out


def test_all_cases_call_their_implementations_with_one_result(few: None) -> None:
    setting = bench.Setting(CPU, torch.float32, True, 1, False, (256,))
    with kernels.using("cpu"):
        assert kernels.serves("cpu")
        for case in bench.cases(setting):
            inputs = case.inputs()
            ours, *others = (call(*inputs) for call in case.calls.values())
            for other in others:
                torch.testing.assert_close(ours, other, rtol=1e-4, atol=1e-4)


def test_resolutions_are_those_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """256 px on a CPU, unless asked otherwise; labels and batches are of the resolution."""
    taken: list[tuple[int, ...]] = []

    def keep(setting: bench.Setting, only: str, seconds: float) -> tuple[core.Ceiling, list[core.Result]]:
        taken.append(setting.px)
        assert [setting.images(px) for px in (256, 1024)] == [4, 1]
        return core.Ceiling(1.0, 1.0), []

    monkeypatch.setattr(bench, "run", keep)
    for asked in ([], ["--px", "256", "1024"], ["--px", "1024"]):
        main(["bench", "kernels", "--device", "cpu", "--json", *asked])
    assert taken == [(256,), (256, 1024), (1024,)]


def test_filter_and_epilogue_are_compared_with_two_passes(few: None, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--device", "cpu", "--no-compile", "--batch", "1", "--seconds", "0.01", "--only", "modulated_fir"]
    main(["bench", "kernels", *options])
    told = capsys.readouterr().out
    assert "x two passes" in told and "modulated_fir 256 px" in told and "failed" not in told


def test_what_fails_is_named_and_what_is_ours_is_not_excused() -> None:
    def broken() -> None:
        raise RuntimeError("no compiler")

    case = core.Case("op", "case", tuple, {"kernel": lambda: None, "compile": broken}, 1, 1)
    result = core.measure(case, CPU, 0.001)
    assert result.failures == {"compile": "RuntimeError: no compiler"} and list(result.seconds) == ["kernel"]
    with pytest.raises(RuntimeError, match="no compiler"):
        core.measure(core.Case("op", "case", tuple, {"kernel": broken}, 1, 1), CPU, 0.001)


def test_the_limit_is_what_takes_longer() -> None:
    case = core.Case("op", "case", tuple, {"kernel": lambda: None}, bytes=100, flops=1000)
    row = core.Result(case, {"kernel": 2.0, "eager": 5.0}).row(core.Ceiling(copy=100.0, matrix=2000.0))
    assert row["limit"] == "memory" and row["of_copy_bandwidth"] == 0.5 and row["speedup"] == {"eager": 2.5}
    assert core.Result(case, {"kernel": 2.0}).row(core.Ceiling(copy=100.0, matrix=500.0))["limit"] == "arithmetic"


class Device:
    """A CUDA device and the clock of its host, in seconds, as far as timing asks for them."""

    now = free = 0.0

    def launch(self, host: float, device: float) -> None:
        self.now += host
        self.free = max(self.free, self.now) + device

    def wait(self) -> None:
        self.now = max(self.now, self.free)

    def event(self, enable_timing: bool) -> Event:
        return Event(self)


class Event:
    def __init__(self, device: Device) -> None:
        self.device, self.at = device, 0.0

    def record(self) -> None:
        self.at = max(self.device.free, self.device.now)

    def query(self) -> bool:
        return self.at <= self.device.now

    def synchronize(self) -> None:
        self.device.now = max(self.device.now, self.at)

    def elapsed_time(self, last: Event) -> float:
        return (last.at - self.at) * 1e3


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> Device:
    made = Device()
    monkeypatch.setattr(torch.cuda, "Event", made.event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: made.launch(0.0, cycles / 2e9), raising=False)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: made.wait())
    return made


@pytest.mark.parametrize("host", [5e-6, 2e-3], ids=["quick host", "slow host"])
def test_a_device_is_timed_without_its_host(pretended: Device, host: float) -> None:
    """Twelve launches of 1 us each, though the host takes up to 2000 times as long for every one."""

    def call() -> None:
        for _ in range(12):
            pretended.launch(host, 1e-6)

    case = core.Case("op", "case", tuple, {"kernel": call}, 1, 1)
    assert core.measure(case, torch.device("cuda"), 0.001).seconds["kernel"] == pytest.approx(12e-6)


def test_what_waits_for_the_device_itself_is_timed_with_its_host(pretended: Device) -> None:
    def call() -> None:
        pretended.launch(1e-3, 1e-6)
        pretended.wait()
        pretended.launch(1e-3, 1e-6)

    case = core.Case("op", "case", tuple, {"kernel": call}, 1, 1)
    assert 1e-3 < core.measure(case, torch.device("cuda"), 0.001).seconds["kernel"] < 3e-3


@pytest.mark.gpu
def test_command_on_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    main(["bench", "kernels", "--device", "cuda", "--precision", "bf16", "--seconds", "0.1", "--only", "256", "--json"])
    told = json.loads(capsys.readouterr().out)
    assert all(not row["failed"] and row["ms"]["kernel"] > 0 for row in told["cases"])
