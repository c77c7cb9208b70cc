"""Objectives: what each named option changes, and that losses are sums over samples however a batch is split."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from sivae_dist.models import Autoencoder, Posterior, Prior
from sivae_dist.models.mlp import MlpConfig
from sivae_dist.objectives import Draws, Objective, ObjectiveConfig, Players, Terms, terms
from sivae_dist.objectives.introvae import IntroVaeConfig
from sivae_dist.objectives.soft_introvae import SoftIntroVaeConfig
from sivae_dist.objectives.vae import VaeConfig
from sivae_dist.registry import components

BATCH = 6
ONE_PHASE_TRAINS_BOTH = "joint"

# Weights that make every term matter.
SOFT = SoftIntroVaeConfig(alpha=1.5, gamma=0.8, beta_rec=0.6, beta_kl=0.7, beta_neg=1.3, gamma_r=0.4, scale=0.5)
INTRO = IntroVaeConfig(beta_rec=0.3, beta_kl=0.9, beta_neg=0.6, margin=0.385)  # between the means of kl_fake and kl_rec
CONFIGS: dict[str, ObjectiveConfig] = {
    "vae": VaeConfig(beta_rec=0.4, beta_kl=0.3),
    "introvae": INTRO,
    "introvae per sample": replace(INTRO, hinge="per_sample"),
    "soft": SOFT,
    "soft paper": replace(SOFT, form="paper"),
    "soft fresh": replace(SOFT, decoder_z="fresh_eps", draws="fresh"),
    "soft reencode": replace(SOFT, decoder_z="reencode", rec_target="detached"),
    "soft prior only": replace(SOFT, fake_sources="prior", form="paper", decoder_z="reencode"),
    "soft without gamma_r": replace(SOFT, gamma_r=0.0),
}


def setting() -> tuple[Autoencoder, Tensor]:
    torch.manual_seed(0)
    model = MlpConfig(width=8, hidden_layers=1).build().double()
    with torch.no_grad():  # larger weights, so that samples differ in every term
        for parameter in model.parameters():
            parameter.mul_(1.7)
    x = torch.randn(BATCH, 2, dtype=torch.float64)
    return model, x


class Noise:
    """Draws by name, remembered; `rows` cuts them down to some samples."""

    def __init__(self, rows: slice = slice(None)) -> None:
        self.rows, self.asked = rows, list[str]()

    def __call__(self, name: str) -> Tensor:
        self.asked.append(name)
        generator = torch.Generator().manual_seed(sum(map(ord, name)))
        return torch.randn(BATCH, 2, dtype=torch.float64, generator=generator)[self.rows]


def decoding(model: Autoencoder) -> Any:
    """A decoder that draws nothing, so that names do not matter."""
    return lambda z, name="", *, from_prior=False: model.decode(z)


class Watched:
    """Players that count calls and keep what passed."""

    def __init__(self, model: Autoencoder) -> None:
        self.encoded, self.decoded = list[Tensor](), list[Tensor]()
        self.players = Players(self._encode(model), self._decode(model), model.prior)

    def _encode(self, model: Autoencoder) -> Any:
        return lambda x: (self.encoded.append(x), model.encode(x))[1]

    def _decode(self, model: Autoencoder) -> Any:
        return lambda z, name="", *, from_prior=False: (self.decoded.append(z), model.decode(z))[1]


def phases_of(
    objective: Objective, model: Autoencoder, x: Tensor, draws: Draws
) -> dict[str, tuple[Terms, dict[str, Tensor]]]:
    """Terms and gradient (of the mean loss, by trained player's parameter) of every phase, without any step."""
    carry: dict[str, Tensor] = {}
    out = {}
    for phase in objective.phases(0):
        result = phase.loss(Players(model.encode, decoding(model), model.prior), x, draws, carry)
        carry.update(result.carry)
        weights = {n: p for n, p in model.named_parameters() if n.split(".")[0] in phase.trains}
        gradients = torch.autograd.grad(result.loss.sum() / BATCH, list(weights.values()))
        out[phase.name] = (result, dict(zip(weights, gradients, strict=True)))
    return out


configs = pytest.mark.parametrize("config", list(CONFIGS.values()), ids=list(CONFIGS))


def test_all_registered_objectives_are_tested_here() -> None:
    registered = components("sivae_dist.objectives", ObjectiveConfig)
    assert registered.keys() == {config.name for config in CONFIGS.values()}


@configs
def test_terms_are_per_sample_and_named_ones_detached(config: ObjectiveConfig) -> None:
    model, x = setting()
    for result, _ in phases_of(config.build((2,)), model, x, Draws(Noise())).values():
        assert result.loss.shape == (BATCH,) and result.loss.requires_grad
        assert all(v.shape == (BATCH,) and not v.requires_grad and v.isfinite().all() for v in result.named.values())
        assert not any(v.requires_grad for v in result.carry.values())


@configs
@pytest.mark.parametrize("cuts", [(3,), (1, 2), (0, 4)])
def test_loss_and_gradient_do_not_depend_on_how_the_batch_is_split(
    config: ObjectiveConfig, cuts: tuple[int, ...]
) -> None:
    """Parts (one of them empty) add up, when `batch_mean` speaks for the whole batch."""
    model, x = setting()
    means: list[Tensor] = []

    def recorded(values: Tensor) -> Tensor:
        means.append(values.detach().mean())
        return means[-1]

    whole = phases_of(config.build((2,)), model, x, Draws(Noise(), recorded))
    losses = {name: torch.zeros((), dtype=torch.float64) for name in whole}
    gradients = {name: {n: torch.zeros_like(g) for n, g in entry[1].items()} for name, entry in whole.items()}
    edges = [0, *cuts, BATCH]
    for start, stop in itertools.pairwise(edges):
        replay = iter(means)
        rows = slice(start, stop)
        part = phases_of(config.build((2,)), model, x[rows], Draws(Noise(rows), lambda _, r=replay: next(r)))
        for name, (result, gradient) in part.items():
            losses[name] += result.loss.detach().sum()
            for n, g in gradient.items():
                gradients[name][n] += g
    for name, (result, gradient) in whole.items():
        torch.testing.assert_close(losses[name], result.loss.detach().sum())
        for n, g in gradient.items():
            torch.testing.assert_close(gradients[name][n], g)


# ---- terms ---------------------------------------------------------------------------------------------------------


def test_reconstruction_by_hand() -> None:
    x, x_hat = torch.tensor([[0.0, 1.0], [0.5, 0.25]]), torch.tensor([[0.5, 0.75], [0.5, 1.0]])
    torch.testing.assert_close(terms.reconstruction(x, x_hat), torch.tensor([0.3125, 0.5625]))
    torch.testing.assert_close(terms.reconstruction(x, x_hat, "l1"), torch.tensor([0.75, 0.75]))
    first = math.log(2) - math.log(0.75)
    torch.testing.assert_close(terms.reconstruction(x[:1], x_hat[:1], "bce"), torch.tensor([first]))


def test_bce_at_and_beyond_the_edges() -> None:
    p = torch.tensor([[0.0], [1.0], [0.0], [-0.1], [1.1]], requires_grad=True)
    x = torch.tensor([[0.0], [1.0], [1.0], [0.5], [0.5]])
    rows = terms.reconstruction(x, p, "bce")
    assert rows[:2].tolist() == [0.0, 0.0] and 80 < float(rows[2].detach()) < 101
    assert rows[3:].isnan().all()  # reported by the engine, not hidden
    (gradient,) = torch.autograd.grad(rows[:3].sum(), p)
    assert gradient.isfinite().all()


def test_kl_against_torch() -> None:
    mu, logvar = torch.randn(4, 3, 2, dtype=torch.float64), torch.randn(4, 3, 2, dtype=torch.float64)
    prior = Prior((3, 2), mu=0.7, logvar=-0.4)
    q = torch.distributions.Normal(mu, torch.exp(0.5 * logvar))
    p = torch.distributions.Normal(torch.full_like(mu, 0.7), math.exp(-0.2))
    expected = torch.distributions.kl_divergence(q, p).flatten(1).sum(1)
    torch.testing.assert_close(terms.kl(Posterior(mu, logvar), prior), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_widened(dtype: torch.dtype) -> None:
    """A sum of 2^17 + 1 squares of 1 has no half-precision value; under autocast too."""
    count = (1 << 17) + 1
    x, x_hat = torch.zeros(1, count, dtype=dtype), torch.ones(1, count, dtype=dtype)
    q = Posterior(torch.full((1, 8), 300.0, dtype=dtype), torch.zeros(1, 8, dtype=dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert terms.reconstruction(x, x_hat).item() == count
        assert terms.kl(q, Prior((8,))).item() == 4 * 300.0**2
        z = terms.reparameterize(q, torch.full((1, 8), 2.0**-10, dtype=dtype))
    assert z.dtype == torch.float32 and z[0, 0].item() == 300 + 2.0**-10
    assert terms.reconstruction(x.double(), x_hat.double()).dtype == torch.float64


def test_prior_sampling() -> None:
    eps = torch.tensor([[1.0, -2.0]])
    torch.testing.assert_close(terms.sample_prior(Prior((2,), mu=0.5, logvar=math.log(4.0)), eps), 0.5 + 2 * eps)
    assert torch.equal(terms.sample_prior(Prior((2,)), eps), eps)


# ---- plain VAE and warm-up -------------------------------------------------------------------------------------------


def test_vae_by_hand() -> None:
    model, x = setting()
    noise = Noise()
    for given, scale in ((1.0, 1.0), (None, 0.5)):
        (phase,) = VaeConfig(beta_rec=0.4, beta_kl=0.3, scale=given).build((2,)).phases(0)
        assert phase.trains == ("encoder", "decoder")
        out = phase.loss(Players(model.encode, decoding(model), model.prior), x, Draws(noise), {})
        q = model.encode(x)
        rec = (model.decode(q.mu + noise("z_post") * torch.exp(q.logvar / 2)) - x).square().sum(1)
        kl = 0.5 * (q.mu.square() + q.logvar.exp() - 1 - q.logvar).sum(1)
        torch.testing.assert_close(out.loss, scale * (0.4 * rec + 0.3 * kl))


@pytest.mark.parametrize("config", [replace(SOFT, vae_warmup_kimg=1.5), replace(INTRO, vae_warmup_kimg=1.5)])
def test_warm_up_ends_on_the_image(config: SoftIntroVaeConfig | IntroVaeConfig) -> None:
    objective = config.build((2,))
    assert [phase.name for phase in objective.phases(1499)] == [ONE_PHASE_TRAINS_BOTH]
    assert [phase.name for phase in objective.phases(1500)] == ["encoder", "decoder"]
    assert [phase.trains for phase in objective.phases(1500)] == [("encoder",), ("decoder",)]


def test_published_warm_up_loss_has_no_scale() -> None:
    model, x = setting()
    soft = replace(SOFT, scale=1e-3, vae_warmup_kimg=1.0, vae_warmup_scale="one").build((2,))
    intro = replace(INTRO, vae_warmup_kimg=1.0).build((2,))
    for objective, beta_rec, beta_kl in ((soft, SOFT.beta_rec, SOFT.beta_kl), (intro, 1.0, 1.0)):
        result, _ = phases_of(objective, model, x, Draws(Noise()))["joint"]
        expected = beta_rec * result.named["rec"] + beta_kl * result.named["kl_real"]
        torch.testing.assert_close(result.loss.detach(), expected)


# ---- IntroVAE --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("margin", [0.0, 0.36, 0.385, 0.4, 50.0])
def test_hinges(margin: float) -> None:
    model, x = setting()
    config = replace(INTRO, margin=margin)
    for hinge in ("batch_mean", "per_sample"):
        result, _ = phases_of(replace(config, hinge=hinge).build((2,)), model, x, Draws(Noise()))["encoder"]  # type: ignore[arg-type]
        n = result.named
        if hinge == "batch_mean":
            adversarial = sum(max(0.0, margin - float(n[name].mean())) for name in ("kl_rec", "kl_fake"))
        else:
            adversarial = sum(float((margin - n[name]).clamp(min=0).mean()) for name in ("kl_rec", "kl_fake"))
        expected = config.beta_kl * (float(n["kl_real"].mean()) + config.beta_neg / 2 * adversarial)
        expected += config.beta_rec * float(n["rec"].mean())
        assert float(result.loss.detach().mean()) == pytest.approx(expected, rel=1e-12)


def test_the_hinges_differ_when_only_some_samples_are_beyond_the_margin() -> None:
    objective = {hinge: replace(INTRO, margin=1.0, hinge=hinge).build((2,)) for hinge in ("batch_mean", "per_sample")}  # type: ignore[arg-type]
    kl = torch.tensor([0.2, 1.4, 0.9], requires_grad=True)
    draws = Draws(Noise())
    values = {hinge: o.hinge(kl, draws) for hinge, o in objective.items()}
    assert float(values["batch_mean"].detach().mean()) == pytest.approx(1 - 2.5 / 3)
    assert float(values["per_sample"].detach().mean()) == pytest.approx((0.8 + 0.1) / 3)
    gradient = {hinge: torch.autograd.grad(v.sum(), kl)[0].tolist() for hinge, v in values.items()}
    assert gradient == {"batch_mean": [-1, -1, -1], "per_sample": [-1, 0, -1]}
    closed = objective["batch_mean"].hinge(kl + 1, draws)
    assert closed.tolist() == [0, 0, 0] and torch.autograd.grad(closed.sum(), kl)[0].tolist() == [0, 0, 0]


def test_introvae_decoder_weight_and_statistics() -> None:
    model, x = setting()
    for choice, alpha in (("published", INTRO.beta_kl / 2), ("paper", INTRO.beta_kl * INTRO.beta_neg / 2)):
        objective = replace(INTRO, decoder_weight=choice).build((2,))  # type: ignore[arg-type]
        result, _ = phases_of(objective, model, x, Draws(Noise()))["decoder"]
        n = result.named
        expected = alpha * (n["kl_rec"] + n["kl_fake"]) + INTRO.beta_rec * n["rec"]
        torch.testing.assert_close(result.loss.detach(), expected)
    assert [phase.statistics for phase in INTRO.build((2,)).phases(0)] == [("encoder", "decoder"), ("encoder",)]


# ---- Soft-IntroVAE ---------------------------------------------------------------------------------------------------


def soft(config: SoftIntroVaeConfig) -> tuple[dict[str, tuple[Terms, dict[str, Tensor]]], Watched, Noise]:
    """Both phases with watched players."""
    model, x = setting()
    watched, noise = Watched(model), Noise()
    carry: dict[str, Tensor] = {}
    out = {}
    for phase in config.build((2,)).phases(0):
        result = phase.loss(watched.players, x, Draws(noise), carry)
        carry.update(result.carry)
        weights = {n: p for n, p in model.named_parameters() if n.split(".")[0] in phase.trains}
        gradients = torch.autograd.grad(result.loss.mean(), list(weights.values()))
        out[phase.name] = (result, dict(zip(weights, gradients, strict=True)))
    return out, watched, noise


def distance(one: dict[str, Tensor], two: dict[str, Tensor]) -> float:
    return max(float((one[n] - two[n]).abs().max() / one[n].abs().max()) for n in one)


def test_soft_loss_values_by_hand() -> None:
    out, _, _ = soft(SOFT)
    encoder, decoder = out["encoder"][0], out["decoder"][0]
    s, n = 0.5, encoder.named
    for source in ("rec", "fake"):
        value = torch.exp(-1.5 * s * (0.6 * n[f"rec_{source}"] + 1.3 * n[f"kl_{source}"]))
        torch.testing.assert_close(n[f"exp_elbo_{source}"], value)
    expected = s * (0.6 * n["rec"] + 0.7 * n["kl_real"]) + (n["exp_elbo_rec"] + n["exp_elbo_fake"]) / 1.5 / 2
    torch.testing.assert_close(encoder.loss.detach(), expected)
    n = decoder.named
    fakes = 0.7 * (n["kl_rec"] + n["kl_fake"]) + 0.4 * 0.6 * (n["rec_rec"] + n["rec_fake"])
    torch.testing.assert_close(decoder.loss.detach(), s * (0.6 * n["rec"] + 0.8 / 2 * fakes))


def test_scale_is_one_over_dimensions_unless_given() -> None:
    assert SoftIntroVaeConfig().build((3, 4, 5)).scale == pytest.approx(1 / 60)
    assert SoftIntroVaeConfig(scale=0.5).build((3, 4, 5)).scale == 0.5


def test_rec_target_changes_the_gradient_only() -> None:
    attached, detached = soft(SOFT)[0], soft(replace(SOFT, rec_target="detached"))[0]
    assert torch.equal(attached["encoder"][0].loss, detached["encoder"][0].loss)
    assert distance(attached["encoder"][1], detached["encoder"][1]) > 1e-3
    assert distance(attached["decoder"][1], detached["decoder"][1]) == 0


def test_decoder_z() -> None:
    runs = {choice: soft(replace(SOFT, decoder_z=choice)) for choice in ("reuse", "fresh_eps", "reencode")}  # type: ignore[arg-type]
    model, x = setting()
    q = model.encode(x)
    fresh = q.mu + Noise()("decoder/z_post") * torch.exp(0.5 * q.logvar)
    calls = 4  # decoder calls of the encoder phase
    z = {choice: watched.decoded[calls + 1] for choice, (_, watched, _) in runs.items()}
    assert torch.equal(z["reuse"], runs["reuse"][1].decoded[1])
    torch.testing.assert_close(z["fresh_eps"], fresh)
    torch.testing.assert_close(z["reencode"], fresh)  # equal here, where the encoder has not moved in between
    assert {choice: len(watched.encoded) for choice, (_, watched, _) in runs.items()} == {
        "reuse": 5,
        "fresh_eps": 5,
        "reencode": 6,
    }
    assert not any(value.requires_grad for value in z.values())


def test_draws() -> None:
    _, shared, asked_shared = soft(SOFT)
    _, fresh, asked_fresh = soft(replace(SOFT, draws="fresh"))
    assert torch.equal(shared.decoded[4], shared.decoded[0])
    assert torch.equal(fresh.decoded[4], Noise()("decoder/z_prior"))
    expected = ["z_prior", "z_post", "encoder/rec", "encoder/fake", "decoder/rec", "decoder/fake"]
    assert asked_shared.asked == expected
    assert sorted(asked_fresh.asked) == sorted([*expected, "decoder/z_prior"])


def test_fake_sources() -> None:
    out, watched, _ = soft(replace(SOFT, fake_sources="prior"))
    encoder, decoder = out["encoder"][0], out["decoder"][0]
    assert not {"kl_rec", "rec_rec", "exp_elbo_rec"} & {*encoder.named, *decoder.named}
    n = encoder.named
    expected = 0.5 * (0.6 * n["rec"] + 0.7 * n["kl_real"]) + n["exp_elbo_fake"] / 1.5
    torch.testing.assert_close(encoder.loss.detach(), expected)
    n = decoder.named
    fake = 0.7 * n["kl_fake"] + 0.4 * 0.6 * n["rec_fake"]
    torch.testing.assert_close(decoder.loss.detach(), 0.5 * (0.6 * n["rec"] + 0.8 * fake))
    assert (len(watched.encoded), len(watched.decoded)) == (3, 6)


def test_gamma_r_zero_saves_two_decoder_passes() -> None:
    out, watched, _ = soft(replace(SOFT, gamma_r=0.0))
    full, full_watched, _ = soft(replace(SOFT, gamma_r=1e-8))
    assert (len(watched.decoded), len(full_watched.decoded)) == (6, 8)
    assert distance(full["decoder"][1], out["decoder"][1]) < 1e-6
    assert "rec_fake" not in out["decoder"][0].named and "rec_fake" in full["decoder"][0].named


@pytest.mark.parametrize("kind", ["mse", "l1"])
def test_rec_real_reduction(kind: Any) -> None:
    """Published l1 divides the real-data and gamma_r terms by the number of elements, not the one within exp()."""
    both = [soft(replace(SOFT, rec_loss=kind, rec_real_reduction=how))[0] for how in ("sum", "published")]  # type: ignore[arg-type]
    divide = 1 if kind == "mse" else 2
    for out, factor in zip(both, (1, 1 / divide), strict=True):
        n = out["encoder"][0].named
        expected = 0.5 * (0.6 * factor * n["rec"] + 0.7 * n["kl_real"]) + (n["exp_elbo_rec"] + n["exp_elbo_fake"]) / 3
        torch.testing.assert_close(out["encoder"][0].loss.detach(), expected)
        n = out["decoder"][0].named
        again = 0.7 * (n["kl_rec"] + n["kl_fake"]) + 0.4 * 0.6 * factor * (n["rec_rec"] + n["rec_fake"])
        torch.testing.assert_close(out["decoder"][0].loss.detach(), 0.5 * (0.6 * factor * n["rec"] + 0.4 * again))
    for name, value in both[0]["encoder"][0].named.items():
        assert torch.equal(value, both[1]["encoder"][0].named[name])  # reports keep their unit


def test_paper_form_by_hand() -> None:
    """L_E = -ELBO(x) + 1/alpha exp(alpha ELBO(Dec(z))), L_D = -ELBO(x) - gamma ELBO(Dec(z)), nothing stopped."""
    out, _, _ = soft(replace(SOFT, form="paper", fake_sources="prior", gamma_r=0.0))
    model, x = setting()
    noise = Noise()

    def elbo(data: Tensor, eps: Tensor, beta_kl: float) -> Tensor:
        q = model.encode(data)
        rec = (model.decode(q.mu + eps * torch.exp(0.5 * q.logvar)) - data).square().sum(1)
        kl = 0.5 * (q.mu.square() + q.logvar.exp() - 1 - q.logvar).sum(1)
        return -0.5 * (0.6 * rec + beta_kl * kl)

    real = elbo(x, noise("z_post"), 0.7)
    loss_e = -real + torch.exp(1.5 * elbo(model.decode(noise("z_prior")), noise("encoder/fake"), 1.3)) / 1.5
    # For the decoder z is a given: the reconstruction's gradient does not depend on how z came about.
    loss_d = -real - 0.8 * elbo(model.decode(noise("z_prior")), noise("decoder/fake"), 0.7)
    for phase, loss in (("encoder", loss_e), ("decoder", loss_d)):
        result, gradients = out[phase]
        torch.testing.assert_close(result.loss, loss)
        weights = dict(model.named_parameters())
        expected = torch.autograd.grad(loss.mean(), [weights[n] for n in gradients], retain_graph=True)
        for n, g in zip(gradients, expected, strict=True):
            torch.testing.assert_close(gradients[n], g)


def test_paper_and_published_form_differ() -> None:
    paper, published = soft(replace(SOFT, form="paper"))[0], soft(replace(SOFT, gamma_r=1.0))[0]
    for phase in ("encoder", "decoder"):
        assert distance(published[phase][1], paper[phase][1]) > 1e-3


# ---- configuration -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "field"),
    [
        (SoftIntroVaeConfig(alpha=0.0), "alpha"),
        (SoftIntroVaeConfig(beta_neg=-1.0), "beta_neg"),
        (SoftIntroVaeConfig(scale=0.0), "scale"),
        (SoftIntroVaeConfig(gamma_r=math.nan), "gamma_r"),
        (IntroVaeConfig(margin=-1.0), "margin"),
        (IntroVaeConfig(vae_warmup_kimg=-1.0), "vae_warmup_kimg"),
        (VaeConfig(beta_rec=-0.1), "beta_rec"),
        (VaeConfig(scale=-1.0), "scale"),
    ],
)
def test_values_out_of_range(config: ObjectiveConfig, field: str) -> None:
    with pytest.raises(ValueError, match=rf"objective\.{field} is .*expected a number"):
        config.build((2,))


def test_warm_up_scale_one_or_same() -> None:
    shape, x, draws = (
        (1, 4, 4),
        torch.rand(3, 1, 4, 4, dtype=torch.float64),
        Draws(lambda name: torch.zeros(3, 2).double()),
    )
    players = Players(
        lambda x: Posterior(x.flatten(1)[:, :2], torch.zeros(len(x), 2).double()),
        lambda z, name="", *, from_prior=False: z.sum(1).reshape(-1, 1, 1, 1).expand(-1, *shape),
        Prior((2,)),
    )
    losses = {}
    for choice in ("one", "same"):
        objective = SoftIntroVaeConfig(vae_warmup_kimg=1, vae_warmup_scale=choice).build(shape)
        (phase,) = objective.phases(0)
        losses[choice] = phase.loss(players, x, draws, {}).loss
        assert len(objective.phases(1000)) == 2
    assert torch.allclose(losses["same"], losses["one"] / 16, rtol=1e-12)
