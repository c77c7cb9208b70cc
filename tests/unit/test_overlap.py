"""`distributed.overlap`: which process group buckets are sent in, and in which order beside all else that is sent.

The process group is pretended: NCCL needs devices, and the order of calls is what counts on them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from sivae_dist.distributed.group import Group
from sivae_dist.distributed.replicated import Replicated
from sivae_dist.distributed.sync_batch_norm import synchronise_batch_norm


@dataclass
class _Pretended:
    """Two ranks of which this is one: sums stay as they are, and who asked for them is kept."""

    backend: str
    made: int = 0  # groups
    sums: list[tuple[object, bool, int]] = field(default_factory=list)  # group, asynchronous, numbers
    waited: int = 0

    def new_group(self, **_: object) -> str:
        self.made += 1
        return "own"

    def all_reduce(self, tensor: Tensor, *_: object, group: object = None, async_op: bool = False) -> Any:
        self.sums.append((group, async_op, tensor.numel()))
        return self if async_op else None

    def wait(self) -> None:
        self.waited += 1


def _pretend(monkeypatch: pytest.MonkeyPatch, backend: str) -> _Pretended:
    pretended = _Pretended(backend)
    monkeypatch.setattr(dist, "get_backend", lambda *_: backend)
    monkeypatch.setattr(dist, "new_group", pretended.new_group)
    monkeypatch.setattr(dist, "all_reduce", pretended.all_reduce)
    monkeypatch.setattr(dist, "broadcast", lambda *_: None)
    return pretended


def _phase(strategy: Replicated, loss: Tensor) -> None:
    strategy.train_only(["net"])
    strategy.backward(loss)
    strategy.reduce("net")
    strategy.step("net")


def _strategy(net: nn.Module) -> Replicated:
    optimizers: dict[str, torch.optim.Optimizer] = {"net": torch.optim.SGD(net.parameters(), 0.1)}
    return Replicated({"net": net}, optimizers, Group(0, 2), overlap=True, bucket_bytes=1)


@pytest.mark.parametrize("backend", ["nccl", "cuda:nccl,cpu:gloo", "gloo"])
def test_only_gloo_gets_a_group_for_the_buckets(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    pretended = _pretend(monkeypatch, backend)
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    strategy = _strategy(synchronise_batch_norm(net, Group(0, 2)))
    x = torch.arange(6.0).reshape(2, 3)
    for _ in range(2):
        pretended.sums.clear()
        _phase(strategy, net(x).square().sum())
    assert strategy.sent_early == 6  # the second time, each parameter as a bucket of its own
    # Within the backward pass: the sums of batch norm, which are in the default group, stand between the buckets'.
    within = [asynchronous for _, asynchronous, _ in pretended.sums[2:]]
    assert within == [True, True, False, True, True, True, True, False]
    assert {group for group, asynchronous, _ in pretended.sums if not asynchronous} == {None}
    assert {group for group, asynchronous, _ in pretended.sums if asynchronous} == {
        "own" if backend == "gloo" else None
    }
    assert pretended.made == (1 if backend == "gloo" else 0)
    assert pretended.waited == 2 * 6


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.sometimes = nn.Parameter(torch.ones(5))
        self.always = nn.Parameter(torch.ones(7))

    def forward(self, all_: bool) -> Tensor:
        loss = self.always.square().sum()
        return loss + self.sometimes.square().sum() if all_ else loss


def test_sums_have_one_order_whether_or_not_a_gradient_came(monkeypatch: pytest.MonkeyPatch) -> None:
    """One communicator takes the calls of all ranks in their order, so a rank with less to send must keep to it."""
    sums = []
    for all_came in (True, False):
        pretended = _pretend(monkeypatch, "nccl")
        net = _Net()
        strategy = _strategy(net)
        _phase(strategy, net(True))
        pretended.sums.clear()
        _phase(strategy, net(all_came))
        assert strategy.sent_early == (2 if all_came else 1)
        sums.append([numbers for *_, numbers in pretended.sums])
    assert sums[0] == sums[1] == [7, 5, 2]
