"""The IntroVAE network and hinge objective against the public implementation."""

from __future__ import annotations

import re

import pytest
import torch
from golden_files import Golden, comparing, files, of
from runs import Step, load, train
from torch import Tensor

from sivae_dist.models import Prior
from sivae_dist.models.residual import ResidualConfig
from sivae_dist.objectives import Draws, terms
from sivae_dist.objectives.introvae import IntroVae, IntroVaeConfig

RUNS = [(name, run) for name in of("introvae") for run in files()[name].runs()]


@pytest.fixture(params=of("introvae"))
def golden(request: pytest.FixtureRequest) -> Golden:
    return files()[request.param]


def test_config_follows_from_shapes(golden: Golden, dtype: torch.dtype) -> None:
    cfg = {name: golden.array(key).tolist() for name, key in golden.under("cfg/").items()}
    model = load("introvae", golden, dtype).model
    built = ResidualConfig(
        channels_in=cfg["cdim"],
        image_size=cfg["image_size"],
        channels=tuple(cfg["channels"]),
        zdim=cfg["hdim"],
        block="introvae",
    ).build()
    shapes = {name: tensor.shape for name, tensor in built.state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in model.state_dict().items()}
    assert len(golden.tensor("in/x", dtype)) == cfg["batch"]


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_forward(golden: Golden, dtype: torch.dtype, mode: str) -> None:
    x, eps, z = (golden.tensor(f"in/{name}", dtype) for name in ("x", "eps", "z"))
    out, out32 = f"out/{mode}/", f"out32/{mode}/"
    with torch.no_grad(), comparing(golden, dtype) as compare:
        model = load("introvae", golden, dtype, train=mode == "train").model
        q = model.encode(x)
        z_post = terms.reparameterize(q, eps)
        rec = model.decode(z_post)
        error = terms.reconstruction(x, rec)
        fresh = load("introvae", golden, dtype, train=mode == "train").model
        found = {
            "mu": q.mu,
            "logvar": q.logvar,
            "z": z_post,
            "rec": rec,
            "kl": terms.kl(q, model.prior),
            "rec_loss_mean": error.mean(),
            "rec_loss_sum": error.sum(),
            "decode": fresh.decode(z),
        }
        for name in golden.under(out):
            if other := re.fullmatch(r"kl_prior_mu_([-\d.]+)", name):
                found[name] = terms.kl(q, Prior(model.prior.shape, mu=float(other[1])))
        for name, value in found.items():
            compare.both(out + name, out32 + name, value, "forward")


def settings(golden: Golden, run: str) -> tuple[IntroVaeConfig, dict[str, float]]:
    cfg = {name: golden.value(key) for name, key in golden.under(f"run/{run}/cfg/").items()}
    config = IntroVaeConfig(
        beta_rec=cfg["weight_rec"],
        beta_kl=cfg["weight_kl"],
        beta_neg=cfg["weight_neg"],
        margin=cfg["m_plus"],
        vae_warmup_kimg=1e9 if cfg["num_vae"] else 0.0,
    )
    return config, {"encoder": cfg["lr_e"], "decoder": cfg["lr_g"]}


@pytest.mark.parametrize(("name", "run"), RUNS)
def test_training(name: str, run: str, dtype: torch.dtype) -> None:
    golden, prefix = files()[name], f"run/{run}/"
    config, rates = settings(golden, run)
    plain = config.vae_warmup_kimg > 0
    net = load("introvae", golden, dtype)
    objective = config.build(net.model.sample_shape)
    batches, eps = golden.tensor(f"{prefix}in/x", dtype), golden.tensor(f"{prefix}in/eps", dtype)
    prior = eps if plain else golden.tensor(f"{prefix}in/noise", dtype)

    logged: list[dict[str, Tensor]] = []
    with comparing(golden, dtype) as compare:
        for i, step in enumerate(
            train(net, objective, rates, batches, lambda i: {"z_post": eps[i], "z_prior": prior[i]})
        ):
            logged.append(_terms(objective, step))
            if i == 0 and plain:
                compare.gradients(f"{prefix}grad/", step.gradients["joint"])
            elif i == 0:
                compare.gradients(f"{prefix}gradE/", step.gradients["encoder"])
                compare.gradients(f"{prefix}gradG/", step.gradients["decoder"])
            if golden.under(f"{prefix}sd_after{i + 1}/"):
                compare.updated(f"{prefix}sd_after{i + 1}/", net.state(), rates)
        for term in logged[0]:
            series = torch.stack([entry[term] for entry in logged])
            compare.both(f"{prefix}out/{term}", f"{prefix}out32/{term}", series, "loss")
        if golden.under(f"{prefix}gradE_decoder/"):
            # What the reference's first backward leaves on the decoder, which it does not freeze then.
            net = load("introvae", golden, dtype)
            draws = Draws({"z_post": eps[0], "z_prior": prior[0]}.__getitem__)
            objective.encoder_loss(net.players(), batches[0], draws, {}).loss.mean().backward()
            mine = {key: gradient for key, gradient in net.gradients().items() if key.startswith("decoder.")}
            compare.gradients(f"{prefix}gradE_decoder/", mine)


def _terms(objective: IntroVae, step: Step) -> dict[str, Tensor]:
    if "joint" in step.terms:
        return {
            "loss_rec": step.mean("joint", "rec"),
            "loss_kl": step.mean("joint", "kl_real"),
            "loss": step.mean("joint", "loss"),
        }
    c = objective.config
    loss, rec = step.mean("encoder", "loss"), step.mean("encoder", "rec")
    return {
        "E/loss_rec": rec,
        "E/lossE_real_kl": step.mean("encoder", "kl_real"),
        "E/lossE_rec_kl": step.mean("encoder", "kl_rec"),
        "E/lossE_fake_kl": step.mean("encoder", "kl_fake"),
        "E/loss_margin": (loss - c.beta_rec * rec) / c.beta_kl,
        "E/lossE": loss,
        "G/lossG_rec_kl": step.mean("decoder", "kl_rec"),
        "G/lossG_fake_kl": step.mean("decoder", "kl_fake"),
        "G/lossG": step.mean("decoder", "loss") - c.beta_rec * step.mean("decoder", "rec"),
    }
