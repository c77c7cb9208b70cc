"""Strategy deepspeed with a GPU that is pretended: waiting for what it sends to the host, and CPUs beside it."""

from __future__ import annotations

import math
import os
import sys
from contextlib import contextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from sivae_dist.distributed import deepspeed
from sivae_dist.distributed.deepspeed import Zero
from sivae_dist.distributed.group import Group
from sivae_dist.distributed.strategy import Traffic
from sivae_dist.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterator


class _Travelling:
    """A ZeRO optimizer with offload whose gradient arrives on the host only when somebody waits for it."""

    cpu_offload = True

    def __init__(self, log: list[str]) -> None:
        self.log = log
        self.flat = torch.zeros(2)
        self.flat.grad = torch.zeros(2)
        self.single_partition_of_fp32_groups = [self.flat]

    def arrive(self) -> None:
        self.log.append("wait")
        assert self.flat.grad is not None
        self.flat.grad.copy_(torch.tensor([3.0, 4.0]))


class _Waiting(_Travelling):
    def _wait_for_offload_copies(self) -> None:
        self.arrive()


def _strategy(zero: _Travelling, device: str) -> Any:
    """A strategy over a pretended engine: DeepSpeed itself wants the device that is not there."""
    net = nn.Linear(2, 1, bias=False)
    net.weight.grad = torch.ones_like(net.weight)

    @contextmanager
    def flush() -> Iterator[None]:
        yield
        zero.log.append("send")

    strategy: Any = object.__new__(Zero)
    strategy.players, strategy.group, strategy.clip_norm, strategy.traffic = {"net": net}, Group(), 1.0, Traffic()
    strategy._device = torch.device(device)
    strategy._engines = {"net": SimpleNamespace(optimizer=zero)}
    strategy._reductions = {"net": flush()}
    strategy._reductions["net"].__enter__()
    return strategy


@pytest.mark.parametrize("waits_itself", [True, False])
def test_a_gradient_on_its_way_to_the_host_is_waited_for(monkeypatch: pytest.MonkeyPatch, waits_itself: bool) -> None:
    zero = _Waiting([]) if waits_itself else _Travelling([])
    if not waits_itself:  # as with a DeepSpeed that knows no such wait
        monkeypatch.setattr(torch.cuda, "current_stream", lambda _: SimpleNamespace(synchronize=zero.arrive))
    gradient = _strategy(zero, "cuda").reduce("net", scale=2.0)
    assert zero.log == ["send", "wait"]
    # Scaled and clipped as it arrived: a late arrival would undo both, and the norm would be another one.
    assert float(gradient.norm) == 2.5
    assert zero.flat.grad is not None and math.isclose(float(zero.flat.grad.norm()), 1.0, rel_tol=1e-5)


def test_nothing_is_waited_for_where_nothing_travels() -> None:
    on_cpu = _Waiting([])
    _strategy(on_cpu, "cpu").reduce("net")
    assert on_cpu.log == ["send"]


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_deepspeed_uses_the_device_of_the_players(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Whatever else the machine has: a run on CPUs (ACCELERATE_USE_CPU) may be on one with a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("DS_ACCELERATOR", "")  # so that what is set is taken back
    monkeypatch.delenv("DS_ACCELERATOR")
    monkeypatch.setitem(sys.modules, "deepspeed", None)  # it decides as it is imported, which ends here
    net, pretended = nn.Linear(2, 1), torch.device(kind)
    if kind == "cuda":
        monkeypatch.setattr(deepspeed, "_device_of", lambda _: pretended)
    with pytest.raises(UserError):
        Zero({"net": net}, {"net": torch.optim.Adam(net.parameters())}, Group())
    assert os.environ["DS_ACCELERATOR"] == kind
    zero: Any = deepspeed.settings(1, pretended, offload=True)["zero_optimization"]
    assert zero["offload_optimizer"] == {"device": "cpu", "pin_memory": kind == "cuda"}
