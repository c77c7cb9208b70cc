"""Blocks that are computed twice instead of kept: the same gradients, weights and buffers bit for bit, less memory."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from sivae_dist import counters
from sivae_dist.data import Batch
from sivae_dist.distributed.replicated import Replicated
from sivae_dist.engine.config import from_dict
from sivae_dist.engine.iteration import Iteration
from sivae_dist.engine.optim import OptimConfig
from sivae_dist.engine.precision import Precision
from sivae_dist.errors import UserError
from sivae_dist.models import Autoencoder, ModelConfig
from sivae_dist.models.blocks import Block, recompute_blocks
from sivae_dist.models.residual import ResidualConfig
from sivae_dist.objectives import ObjectiveConfig
from sivae_dist.objectives.soft_introvae import SoftIntroVaeConfig
from sivae_dist.registry import components

MODELS = components("sivae_dist.models", ModelConfig)
OBJECTIVES: dict[str, Any] = {
    name: cls() for name, cls in components("sivae_dist.objectives", ObjectiveConfig).items() if name
}
OBJECTIVES["soft_introvae, fresh draws"] = SoftIntroVaeConfig(beta_neg=4.0, decoder_z="reencode", draws="fresh")
OBJECTIVES["soft_introvae, paper"] = SoftIntroVaeConfig(beta_neg=4.0, form="paper", fake_sources="prior")


def built(name: str, **changes: Any) -> Autoencoder:
    torch.manual_seed(0)
    model: Autoencoder = replace(MODELS[name].tiny(), **changes).build()  # type: ignore[attr-defined]
    with torch.no_grad():  # so that noise, biases and norms that begin at 0 or 1 matter
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def batch(model: Autoencoder, first: int) -> Batch:
    position = torch.arange(first, first + 4)
    x = counters.normal(counters.key(3, "x"), position, model.sample_shape, torch.float32)
    return Batch(x.sigmoid(), position)


def trained(
    model: Autoencoder, objective: Any, from_pixels: int | None, *, dtype: str = "fp32", accumulation: int = 1
) -> dict[str, torch.Tensor]:
    """Two iterations: every gradient of every phase, then weights and buffers."""
    recompute_blocks(model, from_pixels)
    players = {"encoder": model.encoder, "decoder": model.decoder}
    strategy = Replicated(players, OptimConfig().build(players))
    step = Iteration(
        model, objective.build(model.sample_shape), strategy, accumulation=accumulation, precision=Precision(dtype)
    )
    seen: dict[str, torch.Tensor] = {}

    def observe(phase: Any, terms: Any) -> None:
        for player in phase.trains:
            for name, parameter in players[player].named_parameters():
                if parameter.grad is not None:
                    seen[f"{len(seen)} {phase.name} {player} {name}"] = parameter.grad.clone()

    for number in range(2):
        report = step(batch(model, 4 * number), nimg=4 * number, global_batch=4, observe=observe)
        assert report.skip is None
        seen |= {f"{number} {key}": value.clone() for key, value in report.sums.items()}
    return seen | {name: value.clone() for name, value in model.state_dict().items()}


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    different = [name for name, value in one.items() if not torch.equal(value, other[name])]
    assert not different, different[:5]


class Runs:
    """Counts what the blocks of a model compute."""

    def __init__(self, model: Autoencoder) -> None:
        self.count = 0
        for module in model.modules():
            if isinstance(module, Block):
                module.register_forward_pre_hook(self._one)

    def _one(self, *_: Any) -> None:
        self.count += 1


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("name", MODELS)
def test_equal_bit_for_bit(name: str, objective: str) -> None:
    """float32 on the CPU: the second run repeats the first one's arithmetic, so no tolerance is needed."""
    kept, again = built(name), built(name)
    runs_kept, runs_again = Runs(kept), Runs(again)
    expected = trained(kept, OBJECTIVES[objective], None)
    assert_equal(trained(again, OBJECTIVES[objective], 0), expected)
    if len(kept.sample_shape) == 3:  # every network for images has blocks; points need none
        assert runs_again.count > runs_kept.count > 0


@pytest.mark.parametrize("name", MODELS)
def test_equal_under_autocast_and_with_micro_batches(name: str) -> None:
    objective = OBJECTIVES["soft_introvae"]
    for settings in ({"dtype": "bf16"}, {"accumulation": 3}):
        expected = trained(built(name), objective, None, **settings)
        assert_equal(trained(built(name), objective, 0, **settings), expected)


@pytest.mark.parametrize("blend", [0.3, 1.0])
def test_equal_while_a_network_grows(blend: float) -> None:
    both = built("style"), built("style")
    for model in both:
        model.set_level(1, blend)
    objective = OBJECTIVES["soft_introvae, fresh draws"]
    expected, again = (trained(model, objective, pixels) for model, pixels in zip(both, (None, 0), strict=True))
    assert_equal(again, expected)


def test_conditional_and_group_norm() -> None:
    for changes in ({"norm": "group"}, {"block": "introvae", "output": "sigmoid"}):
        expected = trained(built("residual", **changes), OBJECTIVES["soft_introvae"], None)
        assert_equal(trained(built("residual", **changes), OBJECTIVES["soft_introvae"], 0), expected)


def test_the_comparison_sees_statistics_that_move_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = trained(built("residual"), OBJECTIVES["soft_introvae"], None)
    monkeypatch.setattr("sivae_dist.models.blocks._OnCopies", lambda block: torch.enable_grad())
    different = trained(built("residual"), OBJECTIVES["soft_introvae"], 0)
    assert not torch.equal(different["encoder.last.norm1.running_mean"], expected["encoder.last.norm1.running_mean"])


@pytest.mark.parametrize("pixels, runs", [(None, 6), (0, 12), (6, 10), (12, 8), (13, 6)])
def test_only_blocks_of_that_size(pixels: int | None, runs: int) -> None:
    """12 pixels; the encoder works at 12, 6 and 3, the decoder at 3, 6 and 12: one run each, and one more if chosen."""
    model = ResidualConfig(image_size=12, channels=(4, 6), zdim=5).build()
    assert recompute_blocks(model, pixels) == 6
    counted = Runs(model)
    x = torch.randn(2, *model.sample_shape)
    model.decode(model.encode(x).mu).sum().backward()
    assert counted.count == runs


def test_nothing_is_computed_twice_without_a_backward_pass() -> None:
    model = built("residual")
    recompute_blocks(model, 0)
    counted = Runs(model)
    with torch.no_grad():
        model.decode(model.encode(torch.randn(2, *model.sample_shape)).mu)
    assert counted.count == 6


def test_it_is_no_part_of_a_checkpoint_or_an_architecture() -> None:
    model = built("style")
    keys = list(model.state_dict())
    recompute_blocks(model, 0)
    assert list(model.state_dict()) == keys
    with pytest.raises(UserError, match="recompute_from is -1"):
        from_dict({"train": {"recompute_from": -1}}, "test")
    assert from_dict({"train": {"recompute_from": 256}}, "test").train.recompute_from == 256
    assert from_dict({}, "test").train.recompute_from is None
