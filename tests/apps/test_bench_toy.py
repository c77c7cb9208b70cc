"""`bench toy` compares two loops that do the same work."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sivae_dist.apps.bench import toy
from sivae_dist.data import Batch


def test_the_plain_loop_and_the_engine_take_the_same_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without noise, from the same weights and points: gradients of both phases agree, in single precision."""
    plain, engine = toy.Plain(), toy.contenders()["  gamma_r 1e-8"]()
    assert isinstance(engine, toy.Engine)
    start = {name: tensor.clone() for name, tensor in plain.model.state_dict().items()}
    x = plain.data()

    def zeros(*shape: Any, **_: Any) -> torch.Tensor:
        return torch.zeros(*shape)

    monkeypatch.setattr(torch, "randn", zeros)
    monkeypatch.setattr(torch, "randn_like", torch.zeros_like)
    plain.step(x)
    batch = Batch(x, torch.arange(len(x)))
    engine.iteration(batch, nimg=toy.LATE, global_batch=len(x), noise=lambda _: torch.zeros(len(x), 2))
    expected = dict(plain.model.named_parameters())
    for name, parameter in engine.model.named_parameters():
        assert not torch.equal(parameter, start[name]), name
        one, two = expected[name].grad, parameter.grad
        assert one is not None
        assert two is not None
        assert float((one - two).abs().max()) <= 1e-5 * float(one.abs().max()), name


@pytest.mark.slow
def test_every_loop_is_timed() -> None:
    rows = toy.run(0.0, block=1)
    assert [row.name for row in rows] == list(toy.contenders())
    assert all(row.seconds > 0 and row.data_s >= 0 for row in rows)
