"""`train.decode_once`: two decodings less an iteration, the same gradients, weights and losses bit for bit."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import pytest
import torch

from sivae_dist import counters
from sivae_dist.data import Batch
from sivae_dist.distributed.replicated import Replicated
from sivae_dist.engine.finite import Skip
from sivae_dist.engine.iteration import Iteration, IterationReport
from sivae_dist.engine.optim import OptimConfig
from sivae_dist.engine.precision import Precision
from sivae_dist.errors import UserError
from sivae_dist.models import Autoencoder, ModelConfig, running_averages
from sivae_dist.models.blocks import recompute_blocks
from sivae_dist.models.mlp import MlpConfig
from sivae_dist.models.residual import ResidualConfig
from sivae_dist.objectives.introvae import IntroVaeConfig
from sivae_dist.objectives.soft_introvae import SoftIntroVaeConfig
from sivae_dist.objectives.vae import VaeConfig
from sivae_dist.ops import kernels
from sivae_dist.ops.mlp import mlp
from sivae_dist.registry import components

MODELS = components("sivae_dist.models", ModelConfig)
SOFT = SoftIntroVaeConfig(beta_neg=4.0)
OBJECTIVES: dict[str, tuple[Any, int]] = {  # and how many decodings an iteration it saves
    "soft_introvae": (SOFT, 2),
    "soft_introvae, fresh noise": (replace(SOFT, decoder_z="fresh_eps"), 1),
    "soft_introvae, fresh prior": (replace(SOFT, draws="fresh"), 1),
    "soft_introvae, all fresh": (replace(SOFT, decoder_z="reencode", draws="fresh"), 0),
    "soft_introvae, paper": (replace(SOFT, form="paper", fake_sources="prior"), 2),
    "introvae": (IntroVaeConfig(), 2),
    "vae": (VaeConfig(), 0),
}


def built(name: str, **changes: Any) -> Autoencoder:
    torch.manual_seed(0)
    model: Autoencoder = replace(MODELS[name].tiny(), **changes).build()  # type: ignore[attr-defined]
    with torch.no_grad():  # so that noise, biases and norms that begin at 0 or 1 matter
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


class Training:
    """Iterations of a model, and all that can be seen of them."""

    def __init__(
        self, model: Autoencoder, objective: Any, *, once: bool, dtype: Any = "fp32", accumulation: int = 1
    ) -> None:
        self.model, self.seen, self.decodings = model, {}, 0  # type: tuple[Autoencoder, dict[str, torch.Tensor], int]
        self.players = {"encoder": model.encoder, "decoder": model.decoder}
        self.step = Iteration(
            model,
            objective.build(model.sample_shape),
            Replicated(self.players, OptimConfig().build(self.players)),
            accumulation=accumulation,
            precision=Precision(dtype),
            decode_once=once,
        )
        model.decoder.register_forward_hook(self._one)

    def _one(self, *_: Any) -> None:
        self.decodings += 1

    def _observe(self, phase: Any, terms: Any) -> None:
        for player in self.players:
            for name, parameter in self.players[player].named_parameters():
                if parameter.grad is not None:
                    self.seen[f"{len(self.seen)} {phase.name} {player} {name}"] = parameter.grad.clone()
                assert parameter.requires_grad == (player in phase.trains)

    def __call__(self, first: int, factor: float = 1.0) -> IterationReport:
        position = torch.arange(first, first + 4)
        x = counters.normal(counters.key(3, "x"), position, self.model.sample_shape, torch.float32).sigmoid() * factor
        report = self.step(Batch(x, position), nimg=first, global_batch=4, observe=self._observe)
        self.seen |= {f"{first} {key}": value.clone() for key, value in report.sums.items()}
        return report


def assert_same(one: Training, other: Training, *, rounding: float = 0.0) -> None:
    """Gradients, terms and weights bit for bit (or so); running averages up to the rounding of one more addition."""
    assert one.seen.keys() == other.seen.keys()
    for name, value in one.seen.items():
        if rounding:
            torch.testing.assert_close(value, other.seen[name], rtol=rounding, atol=rounding, msg=name)
        else:
            assert torch.equal(value, other.seen[name]), name
    averages = {id(average) for average, _ in running_averages(one.model) if average.is_floating_point()}
    theirs = dict(other.model.named_parameters()) | dict(other.model.named_buffers())
    for name, mine in (dict(one.model.named_parameters()) | dict(one.model.named_buffers())).items():
        if id(mine) in averages:
            torch.testing.assert_close(mine, theirs[name], rtol=2e-6, atol=2e-6)
        elif rounding:
            torch.testing.assert_close(mine, theirs[name], rtol=rounding, atol=rounding, msg=name)
        else:
            assert torch.equal(mine, theirs[name]), name


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("name", MODELS)
def test_equal_bit_for_bit(name: str, objective: str) -> None:
    config, saved = OBJECTIVES[objective]
    plain, once = (Training(built(name), config, once=on) for on in (False, True))
    for first in (0, 4):
        assert plain(first).skip is None
        assert once(first).skip is None
    # With one of two kept, its part of a gradient comes second instead of first (Adam's first steps make much of it).
    assert_same(plain, once, rounding=1e-3 if saved == 1 else 0.0)
    assert plain.decodings - once.decodings == 2 * saved


OTHER: tuple[dict[str, Any], ...] = ({"dtype": "bf16"}, {"accumulation": 3}, {"accumulation": 7}, {"recomputed": True})


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    ("settings", "objective"),
    [*((settings, SOFT) for settings in OTHER), *((settings, IntroVaeConfig()) for settings in OTHER[-1:])],
    ids=lambda value: str(value) if isinstance(value, dict) else value.name,
)
def test_equal_in_other_settings(name: str, settings: dict[str, Any], objective: Any) -> None:
    """Autocast, micro-batches (each keeps its own; some are empty), and blocks recomputed in both backward passes."""
    settings = dict(settings)
    models = built(name), built(name)
    if settings.pop("recomputed", False):
        for model in models:
            recompute_blocks(model, 0)
    pairs = zip(models, (False, True), strict=True)
    plain, once = (Training(model, objective, once=on, **settings) for model, on in pairs)
    for first in (0, 4):
        plain(first)
        once(first)
    assert_same(plain, once)
    assert once.decodings < plain.decodings


def test_batch_norm_moves_as_often(seed: int = 5) -> None:
    """Statistics and the number of batches seen, on far more steps than one: the rounding does not add up."""
    plain, once = (Training(built("residual", norm="batch"), SOFT, once=on) for on in (False, True))
    for step in range(25):
        plain(4 * step)
        once(4 * step)
    assert_same(plain, once)
    counts = [b for n, b in once.model.decoder.named_buffers() if n.endswith("num_batches_tracked")]
    assert counts and all(count == 25 * 8 for count in counts)  # four decodings a phase


def test_a_skipped_phase_leaves_nothing_behind() -> None:
    """What a skipped encoder phase kept is gone with its iteration; the next one is as without it."""
    plain, once = (Training(built("residual", norm="batch"), SOFT, once=on) for on in (False, True))
    for training in (plain, once):
        assert training(0).skip is None
        assert isinstance(training(4, factor=float("nan")).skip, Skip)
        assert training(8).skip is None
    once.seen = {k: v for k, v in once.seen.items() if v.isfinite().all()}
    plain.seen = {k: v for k, v in plain.seen.items() if v.isfinite().all()}
    assert_same(plain, once)


def test_a_z_that_is_another_is_decoded() -> None:
    """An objective that names a draw and then decodes something else under its name gets what it asked for."""
    training = Training(built("mlp"), SOFT, once=True)
    objective: Any = training.step.objective
    plain = objective.decoder_loss

    def other(players: Any, x: torch.Tensor, draws: Any, carry: dict[str, torch.Tensor]) -> Any:
        return plain(players, x, draws, carry | {"z_post": carry["z_post"] + 1})

    objective.decoder_loss = other
    assert training(0).skip is None
    assert training.decodings == 7  # of 8: one saved, not two


def test_no_gradients_for_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kept graph reaches the decoder's weights, but the encoder phase computes none of their gradients."""
    module = sys.modules["sivae_dist.ops.mlp"]
    monkeypatch.setattr(kernels, "dense", lambda: "onednn")
    products: list[int] = []
    product = module._product

    def counted(*arguments: Any, **options: Any) -> torch.Tensor:
        products.append(1)
        return product(*arguments, **options)

    monkeypatch.setattr(module, "_product", counted)
    counts = {}
    for once in (False, True):
        training = Training(MlpConfig().build(), replace(SOFT, gamma_r=0.0), once=once)
        products.clear()
        training(0)
        counts[once] = len(products)
    layers = len([p for p in MlpConfig().build().decoder.parameters() if p.dim() == 2])
    assert counts[False] - counts[True] == 2 * layers - 1  # the gradient of z_post, which nobody wants, is thin


@pytest.mark.parametrize("ask", ["x", "weight", "both", "backward"])
def test_a_chain_differentiated_in_part(monkeypatch: pytest.MonkeyPatch, ask: str) -> None:
    monkeypatch.setattr(kernels, "dense", lambda: "onednn")
    torch.manual_seed(0)
    weights = [torch.randn(32, 24, requires_grad=True), torch.randn(20, 32, requires_grad=True)]
    biases = [torch.randn(32, requires_grad=True), torch.randn(20, requires_grad=True)]
    x = torch.randn(40, 24, requires_grad=True)
    inputs = {"x": [x], "weight": [weights[1]], "both": [x, biases[0], weights[0]], "backward": [x, *weights, *biases]}
    h = torch.relu(x @ weights[0].t() + biases[0]) @ weights[1].t() + biases[1]
    expected = torch.autograd.grad(h.square().sum(), inputs[ask])
    loss = mlp(x, weights, biases).square().sum()
    if ask == "backward":
        loss.backward()
        found = [tensor.grad for tensor in inputs[ask]]
    else:
        found = list(torch.autograd.grad(loss, inputs[ask]))
    for mine, theirs in zip(found, expected, strict=True):
        assert mine is not None
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-3)


def test_strategies_that_cannot_are_refused() -> None:
    model = ResidualConfig.tiny().build()
    players = {"encoder": model.encoder, "decoder": model.decoder}
    strategy = Replicated(players, OptimConfig().build(players))
    strategy.keeps_graphs = False  # type: ignore[misc]
    with pytest.raises(UserError, match=r"train.decode_once is True, but distributed.strategy ddp keeps no graph"):
        Iteration(model, SOFT.build(model.sample_shape), strategy, decode_once=True)
