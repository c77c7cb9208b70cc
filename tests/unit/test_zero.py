"""Strategy deepspeed where CPUs can pretend to be what it needs: the wait for what DeepSpeed sends to the host."""

from __future__ import annotations

import math
from contextlib import contextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from sivae_dist.distributed.deepspeed import Zero
from sivae_dist.distributed.group import Group
from sivae_dist.distributed.strategy import Traffic

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
