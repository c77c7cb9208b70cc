"""The style-based network, its optimizer and its growing, beyond what recorded numbers say."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from sivae_dist import counters
from sivae_dist.data import Batch
from sivae_dist.distributed.replicated import Replicated
from sivae_dist.engine import checkpoint
from sivae_dist.engine.draws import PositionDraws
from sivae_dist.engine.ema import Ema, EmaConfig
from sivae_dist.engine.iteration import Iteration
from sivae_dist.engine.lreq_adam import LreqAdam
from sivae_dist.engine.optim import OptimConfig, PlayerOptim, parameter_groups
from sivae_dist.engine.progressive import GrowthConfig, blended
from sivae_dist.errors import UserError
from sivae_dist.interop import published_keys
from sivae_dist.models.style import StyleAutoencoder, StyleConfig
from sivae_dist.models.style.layers import ConvDown, ConvUp, blur
from sivae_dist.objectives.soft_introvae import SoftIntroVaeConfig
from sivae_dist.ops.adain_act import standardised

TINY = StyleConfig.tiny()
STATE: dict[str, Any] = {"plan_salt": 0, "sums": {}, "data": ""}  # what a checkpoint must say besides tensors
PUBLISHED = PlayerOptim(lr=0.002, beta1=0.0, beta2=0.99)


def build(config: StyleConfig = TINY, seed: int = 0) -> StyleAutoencoder:
    """With noise weights that matter (they start at zero)."""
    torch.manual_seed(seed)
    model = config.build()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "noise_weight" in name or "bias" in name:
                parameter.normal_(0, 0.3)
    return model


def draws(position: Tensor, *, from_prior: bool = False, key: int = 7, batch: int = 0) -> PositionDraws:
    return PositionDraws(key, position, batch, torch.float32, from_prior, lambda rows: rows.mean(0))


# ---- gradients of statistics ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [-1.0, 0.0, 1.0])
def test_a_constant_image_gives_finite_gradients(value: float) -> None:
    """Where biases are zero, as at the start, grey makes every map constant; published code gives nan."""
    torch.manual_seed(0)
    model = TINY.build()
    x = torch.full((2, *model.sample_shape), value, requires_grad=True)
    q = model.encode(x)
    (q.mu.square().sum() + q.logvar.sum()).backward()
    assert x.grad is not None and x.grad.isfinite().all()
    for name, parameter in model.encoder.named_parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all(), name


def test_deviation_and_its_gradient_are_the_plain_ones_elsewhere() -> None:
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    x[0, 1] = 0.3
    x.requires_grad_()
    normed, mean, std = standardised(x, 1e-5)
    torch.testing.assert_close(normed, functional.instance_norm(x, eps=1e-5))
    torch.testing.assert_close(mean, x.mean((2, 3)))
    torch.testing.assert_close(std, x.std((2, 3), correction=0))
    assert std[0, 1] < 1e-15
    (gradient,) = torch.autograd.grad((std * torch.arange(6.0).reshape(2, 3)).sum(), x)
    assert gradient.isfinite().all()
    (plain,) = torch.autograd.grad((x.std((2, 3), correction=0) * torch.arange(6.0).reshape(2, 3)).sum(), x)
    torch.testing.assert_close(gradient[1], plain[1])
    assert not gradient[1].eq(0).any()
    zeros = torch.zeros(1, 1, 2, 2, requires_grad=True)
    (gradient,) = torch.autograd.grad(standardised(zeros, 1e-5)[2].sum(), zeros)
    assert torch.equal(gradient, torch.zeros(1, 1, 2, 2))


# ---- resampling ----------------------------------------------------------------------------------------------------


def test_fused_resampling_equals_two_steps() -> None:
    """Down: everywhere but at the border. Up: nearest x2 and convolution is the transposed convolution."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    plain, fused = (ConvDown(3, 4, fused=fused).double() for fused in (False, True))
    fused.load_state_dict(plain.state_dict())
    torch.testing.assert_close(fused(x), plain(x))
    plain_up, fused_up = (ConvUp(3, 4, fused=fused).double() for fused in (False, True))
    with torch.no_grad():  # a transposed convolution turns its kernel round and stores inputs first
        fused_up.weight.copy_(plain_up.weight.transpose(0, 1).flip(2, 3))
    torch.testing.assert_close(fused_up(x), plain_up(x))


def test_blur_keeps_the_mean_of_the_inside() -> None:
    x = torch.zeros(1, 2, 5, 5)
    x[0, 1, 2, 2] = 16.0
    assert torch.equal(blur(x)[0, 1, 1:4, 1:4], torch.tensor([[1.0, 2, 1], [2, 4, 2], [1, 2, 1]]))
    assert not blur(x)[0, 0].any()


# ---- noise and mixing ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", ["random", "batch_constant", "fixed", "off", "published_bump"])
def test_images_do_not_depend_on_how_a_batch_is_split(noise: Any) -> None:
    model = build(replace(TINY, noise=noise, style_mixing_prob=1.0)).train()
    z, position = torch.randn(5, 5), torch.tensor([3, 4, 9, 1 << 40, 5])
    whole = model.decode(z, None, draws(position, from_prior=True))
    for rows in (slice(0, 2), slice(2, 5)):
        part = model.decode(z[rows], None, draws(position[rows], from_prior=True))
        torch.testing.assert_close(part, whole[rows], rtol=1e-4, atol=1e-5)
    again = model.decode(z, None, draws(position, from_prior=True))
    assert torch.equal(again, whole)
    for other in (draws(position + 1), draws(position, key=8), draws(position, batch=5)):
        changes = {"random": True, "batch_constant": other.position is position}.get(noise, False)
        same = model.decode(z, None, draws(position))
        assert torch.equal(model.decode(z, None, other), same) != changes


def test_noise_differs_from_sample_to_sample_or_not() -> None:
    z = torch.randn(1, 5).expand(2, -1)
    for noise, differs in (("random", True), ("batch_constant", False), ("fixed", False), ("off", False)):
        model = build(replace(TINY, noise=noise)).eval()  # type: ignore[arg-type]
        one, two = model.decode(z, None, draws(torch.arange(2)))
        assert (not torch.allclose(one, two, atol=1e-4)) == differs, noise


def test_without_draws_an_image_is_a_function_of_its_code() -> None:
    for noise in ("random", "batch_constant"):
        model = build(replace(TINY, noise=noise)).eval()  # type: ignore[arg-type]
        fixed = build(replace(TINY, noise="fixed")).eval()
        z = torch.randn(3, 5)
        assert torch.equal(model.decode(z), model.decode(z))
        assert torch.equal(model.decode(z), fixed.decode(z))
        assert not torch.allclose(model.decode(z), build(replace(TINY, noise="off")).eval().decode(z), atol=1e-3)


def test_mixing_touches_prior_samples_in_training_only() -> None:
    model = build(replace(TINY, style_mixing_prob=1.0)).train()
    z, position = torch.randn(64, 5), torch.arange(64)
    cutoffs = set()
    for batch in range(200):
        styles = model.decoder.styles(z, draws(position, from_prior=True, batch=batch))
        own = model.decoder.map(z)[:, None]
        kept = (styles == own).all(dim=2)
        cutoff = int(kept[0].sum())
        assert torch.equal(kept, (torch.arange(2 * model.levels) < cutoff).expand_as(kept))
        cutoffs.add(min(cutoff, 2 * model.levels))
    assert cutoffs == set(range(1, 2 * model.levels + 1))
    for quiet in (draws(position), None):
        assert torch.equal(model.decoder.styles(z, quiet), model.decoder.map(z)[:, None].expand(-1, 6, -1))
    styles = model.eval().decoder.styles(z, draws(position, from_prior=True))
    assert torch.equal(styles, own.expand_as(styles))


def test_mixing_happens_as_often_as_asked() -> None:
    mixed = [draws(torch.arange(1), batch=batch).uniform("mixing") < 0.3 for batch in range(4000)]
    assert abs(sum(mixed) / len(mixed) - 0.3) < 0.03


# ---- average style -------------------------------------------------------------------------------------------------


def test_average_style_moves_in_training_only_and_truncation_pulls_to_it() -> None:
    model = build(replace(TINY, dlatent_avg_beta=0.5)).train()
    z = torch.randn(4, 5)
    w = model.decoder.map(z)
    model.decode(z)
    torch.testing.assert_close(model.decoder.dlatent_avg, 0.5 * w.mean(0).expand(6, -1))
    before = model.decoder.dlatent_avg.clone()
    model.eval()
    image = model.decode(z)
    model.decoder(z, truncation_psi=0.3)
    assert torch.equal(model.decoder.dlatent_avg, before)
    torch.testing.assert_close(model.decoder(z, truncation_psi=1.0), image)  # matrix products round by memory layout
    styles = model.decoder.truncate(model.decoder.styles(z), 0.0)
    torch.testing.assert_close(styles[:, :3], before[None, :3].expand(4, -1, -1))
    assert torch.equal(styles[:, 3:], w[:, None].expand(-1, 3, -1))


def test_average_style_survives_what_is_no_number() -> None:
    model = build().train()
    model.decode(torch.randn(4, 5))
    before = model.decoder.dlatent_avg.clone()
    model.decode(torch.full((4, 5), math.nan))
    model.decode(torch.zeros(0, 5))
    assert torch.equal(model.decoder.dlatent_avg, before)


def test_average_model_averages_the_style_too() -> None:
    model = build().train()
    ema = Ema(EmaConfig(half_life_kimg=0.01, rampup=0), model)
    model.decode(torch.randn(4, 5))
    ema.update(model, nimg=10, batch=10)
    torch.testing.assert_close(ema.model.decoder.dlatent_avg, 0.5 * model.decoder.dlatent_avg)


# ---- training ------------------------------------------------------------------------------------------------------


def train(model: StyleAutoencoder, *, parts: int = 1, level: int = 2) -> dict[str, Tensor]:
    """Two published iterations at a level, optionally as micro-batches; the weights."""
    model.set_level(level)
    players = {"encoder": model.encoder, "decoder": model.decoder}
    optimizers = OptimConfig(PUBLISHED, PUBLISHED, "lreq_adam").build(players)
    objective = SoftIntroVaeConfig(decoder_z="reencode", draws="fresh", beta_neg=4.0).build(model.sample_shape)
    iteration = Iteration(model, objective, Replicated(players, optimizers), accumulation=parts)
    for nimg in (0, 4):
        position = torch.arange(nimg, nimg + 4)
        x = counters.normal(3, position, model.sample_shape, torch.float64).tanh()
        report = iteration(Batch(x, position), nimg=nimg, global_batch=4)
        assert all(bool(norm.isfinite()) for norm in report.grad_norm.values())
    return model.state_dict()


def test_training_does_not_depend_on_micro_batches() -> None:
    one, two = (train(build(replace(TINY, dlatent_avg_beta=1.0)).double(), parts=parts) for parts in (1, 3))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-7, atol=1e-9)


def test_levels_not_in_use_stay_as_they_are() -> None:
    start = build().double().state_dict()
    start = {name: tensor.clone() for name, tensor in start.items()}
    after = train(build().double(), level=1)
    still = {name for name, tensor in after.items() if torch.equal(tensor, start[name])}
    assert {"decoder.to_rgb.2.weight", "decoder.blocks.2.bias_1", "encoder.blocks.0.conv_1.weight"} <= still
    assert {"encoder.from_rgb.0.bias", "encoder.from_rgb.2.weight", "decoder.to_rgb.0.bias"} <= still
    assert not any(name.startswith(("encoder.mapping", "decoder.blocks.1", "decoder.to_rgb.1")) for name in still)


# ---- optimizer -----------------------------------------------------------------------------------------------------


def test_lreq_adam_follows_its_definition() -> None:
    torch.manual_seed(0)
    p = torch.randn(5, dtype=torch.float64, requires_grad=True)
    unused = torch.ones(2, requires_grad=True)
    optimizer = LreqAdam([{"params": [p], "lr": 0.02}, {"params": [unused], "lr": 1.0}], lr=1.0, beta2=0.9, eps=1e-3)
    expected, v = p.detach().clone(), torch.zeros(5, dtype=torch.float64)
    for t in range(1, 5):
        p.grad = torch.randn(5, dtype=torch.float64)
        v = 0.9 * v + 0.1 * p.grad**2
        expected = expected - 0.02 * math.sqrt(1 - 0.9**t) * p.grad / (v.sqrt() + 1e-3)
        optimizer.step()
        torch.testing.assert_close(p.detach(), expected, rtol=1e-13, atol=0)
    assert torch.equal(unused.detach(), torch.ones(2)) and not optimizer.state[unused]
    assert optimizer.state[p].keys() == {"step", "exp_avg_sq"} and float(optimizer.state[p]["step"]) == 4


def test_multipliers_reach_the_optimizer_and_survive_a_copy() -> None:
    model = build()
    again = copy.deepcopy(model)
    assert again.decoder.lr_multipliers() == model.decoder.lr_multipliers()
    config = OptimConfig(PUBLISHED, PUBLISHED, "lreq_adam", milestones_kimg=(1.0,))
    optimizers = config.build({"encoder": again.encoder, "decoder": again.decoder})
    assert config.apply(optimizers, 1000) == {"encoder": pytest.approx(2e-4), "decoder": pytest.approx(2e-4)}
    rate = {id(p): group["lr"] for group in optimizers["decoder"].param_groups for p in group["params"]}
    assert len(rate) == len(list(again.decoder.parameters()))
    for name, parameter in again.decoder.named_parameters():
        expected = 2e-4 * again.decoder.lr_multipliers().get(name, 1.0)
        assert rate[id(parameter)] == pytest.approx(expected), name
    assert rate[id(again.decoder.mapping[0].bias)] == pytest.approx(2e-5)
    assert rate[id(again.decoder.const)] == pytest.approx(2e-4)
    assert [len(group["params"]) for group in parameter_groups(torch.nn.Linear(2, 2), 1.0)] == [2]


def test_optimizer_state_goes_through_a_checkpoint(tmp_path: Path) -> None:
    """At a level that leaves parameters without state."""
    model = build()
    model.set_level(1)
    config = OptimConfig(PUBLISHED, PUBLISHED, "lreq_adam")
    optimizers = config.build({"encoder": model.encoder, "decoder": model.decoder})
    for seed in (1, 2):
        torch.manual_seed(seed)
        q = model.encode(torch.randn(2, 3, 8, 8))
        model.zero_grad()
        model.decode(q.sample(torch.randn(2, 5))).square().sum().backward()
        for optimizer in optimizers.values():
            optimizer.step()
    saved = checkpoint.read(checkpoint.write(tmp_path, checkpoint.snapshot(8, model, model, optimizers, STATE)))
    other = build(seed=5)
    others = config.build({"encoder": other.encoder, "decoder": other.decoder})
    checkpoint.restore(saved, other, other, others)
    for player, optimizer in optimizers.items():
        one, two = optimizer.state_dict()["state"], others[player].state_dict()["state"]
        assert one.keys() == two.keys() and 0 < len(one) < len(list(getattr(model, player).parameters()))
        for index, state in one.items():
            assert state.keys() == two[index].keys() == {"step", "exp_avg_sq"}
            assert all(torch.equal(value, two[index][key]) for key, value in state.items())


def test_a_first_moment_is_refused() -> None:
    with pytest.raises(UserError, match=r"optim\.decoder\.beta1 is 0\.9") as caught:
        OptimConfig(PUBLISHED, PlayerOptim(), "lreq_adam")
    assert "beta1 to 0" in caught.value.fix


# ---- settings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"image_size": 100}, ("100", "power of two", "64 or 128")),
        ({"image_size": 4}, ("power of two", "8 or 16")),
        ({"startf": 0}, ("model.startf is 0",)),
        ({"latent_size": -3}, ("model.latent_size",)),
        ({"input_range": (1.0, 0.0)}, ("model.input_range",)),
        ({"style_mixing_prob": 1.5}, ("style_mixing_prob is 1.5", "0 to 1")),
        ({"truncation_cutoff": -1}, ("truncation_cutoff",)),
    ],
)
def test_bad_settings(fields: dict[str, Any], words: tuple[str, ...]) -> None:
    with pytest.raises(UserError) as caught:
        StyleConfig(**fields).build()
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize(
    ("fields", "word"), [({"fade_kimg": 2000.0}, "fade_kimg 2000"), ({"lr": ()}, r"progressive\.lr")]
)
def test_bad_growth(fields: dict[str, Any], word: str) -> None:
    with pytest.raises(UserError, match=word):
        GrowthConfig(**fields)


def test_images_of_another_level_are_refused() -> None:
    model = build()
    model.set_level(1)
    with pytest.raises(ValueError, match="level 1: 8 wanted"):
        model.encode(torch.zeros(1, 3, 16, 16))


def test_growth_by_hand() -> None:
    growth = GrowthConfig(level_kimg=1.0, fade_kimg=0.5, batch=(8, 4), lr=(0.1, 0.2, 0.3), beta_neg=(5.0, 6.0))
    assert [growth.level(n, 3) for n in (0, 999, 1000, 1999, 2000, 9000)] == [0, 0, 1, 1, 2, 2]
    assert growth.at(0, 3).blend == 1 and growth.at(1000, 3).blend == 0 and growth.at(1500, 3).blend == 1
    assert growth.at(1250, 3).blend == pytest.approx(0.5)
    stage = growth.at(2100, 3)
    assert (stage.batch, stage.lr, stage.beta_neg) == (4, 0.3, 6.0)
    x = torch.randn(2, 3, 4, 4)
    assert torch.equal(blended(x, 1.0), x)
    assert not torch.equal(blended(x, 0.0), x) and torch.equal(blended(blended(x, 0.0), 0.0), blended(x, 0.0))


def test_foreign_keys_are_refused() -> None:
    with pytest.raises(UserError, match=r"encoder\.fc\.weight"):
        published_keys.names("style", ["encoder.fc.weight"])
    with pytest.raises(UserError, match="not make up a published style"):
        published_keys.settings("style", {"encoder.from_rgb.0.from_rgb.weight": (4, 3, 1, 1)})
