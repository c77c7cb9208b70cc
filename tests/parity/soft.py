"""Soft-IntroVAE and plain-VAE runs, whose recorded names differ a little between the image and the 2-D code."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from golden_files import Golden, comparing
from runs import Net, Step, load, train
from torch import Tensor

from sivae_dist.interop.published_keys import Family
from sivae_dist.objectives.soft_introvae import SoftIntroVae, SoftIntroVaeConfig

ENCODER, DECODER = "encoder", "decoder"


@dataclass(frozen=True)
class Layout:
    """How a code base calls things.

    noise:  our names of the five recorded draws, in their order
    values: recorded name -> (phase, term), a mean over the batch
    rows:   recorded name -> (phase, term), per sample
    averaged: recorded names (among values) that l1 and bce average over all elements
    """

    noise: tuple[str, ...]
    values: dict[str, tuple[str, str]]
    rows: dict[str, tuple[str, str]]
    averaged: tuple[str, ...]


IMAGE = Layout(
    noise=("z_post", "encoder/rec", "encoder/fake", "decoder/rec", "decoder/fake"),
    values={
        "E/loss_rec": (ENCODER, "rec"),
        "E/lossE_real_kl": (ENCODER, "kl_real"),
        "E/expelbo_rec": (ENCODER, "exp_elbo_rec"),
        "E/expelbo_fake": (ENCODER, "exp_elbo_fake"),
        "E/lossE": (ENCODER, "loss"),
        "D/loss_rec": (DECODER, "rec"),
        "D/lossD_rec_kl": (DECODER, "kl_rec"),
        "D/lossD_fake_kl": (DECODER, "kl_fake"),
        "D/loss_rec_rec": (DECODER, "rec_rec"),
        "D/loss_fake_rec": (DECODER, "rec_fake"),
        "D/lossD": (DECODER, "loss"),
    },
    rows={
        "E/kl_rec": (ENCODER, "kl_rec"),
        "E/kl_fake": (ENCODER, "kl_fake"),
        "E/loss_rec_rec_e": (ENCODER, "rec_rec"),
        "E/loss_rec_fake_e": (ENCODER, "rec_fake"),
    },
    averaged=("E/loss_rec", "D/loss_rec", "D/loss_rec_rec", "D/loss_fake_rec"),
)

TWOD = Layout(
    noise=("z_post", "encoder/fake", "encoder/rec", "decoder/rec", "decoder/fake"),
    values={
        "E/loss_rec": (ENCODER, "rec"),
        "E/lossE_real_kl": (ENCODER, "kl_real"),
        "E/exp_elbo_rec": (ENCODER, "exp_elbo_rec"),
        "E/exp_elbo_fake": (ENCODER, "exp_elbo_fake"),
        "E/lossE": (ENCODER, "loss"),
        "D/loss_rec": (DECODER, "rec"),
        "D/rec_kl": (DECODER, "kl_rec"),
        "D/fake_kl": (DECODER, "kl_fake"),
        "D/loss_rec_rec": (DECODER, "rec_rec"),
        "D/loss_rec_fake": (DECODER, "rec_fake"),
        "D/lossD": (DECODER, "loss"),
    },
    rows={
        "E/rec_kl_e": (ENCODER, "kl_rec"),
        "E/fake_kl_e": (ENCODER, "kl_fake"),
        "E/loss_rec_rec": (ENCODER, "rec_rec"),
        "E/loss_fake_rec": (ENCODER, "rec_fake"),
    },
    averaged=("E/loss_rec", "D/loss_rec", "D/loss_rec_rec", "D/loss_rec_fake"),
)


def settings(golden: Golden, run: str) -> tuple[dict[str, Any], dict[str, float]]:
    """Objective fields (without scale and warm-up) and learning rates of a run."""
    cfg = {name: golden.value(key) for name, key in golden.under(f"run/{run}/cfg/").items()}
    fields: dict[str, Any] = {name: cfg[name] for name in ("beta_rec", "beta_kl", "beta_neg", "gamma_r")}
    fields |= {"rec_loss": cfg.get("recon_loss_type", "mse"), "rec_real_reduction": "published"}
    return fields, {"encoder": cfg["lr_e"], "decoder": cfg["lr_d"]}


def replay(golden: Golden, run: str, family: Family, layout: Layout, scale: float | None, dtype: torch.dtype) -> None:
    """Repeats a run and compares everything recorded about it."""
    prefix = f"run/{run}/"
    plain = f"{prefix}out/loss" in golden
    fields, rates = settings(golden, run)
    net = load(family, golden, dtype)
    warm = {"vae_warmup_kimg": 1e9 if plain else 0, "vae_warmup_scale": "one"}
    objective = SoftIntroVaeConfig(**fields, **warm, scale=scale).build(net.model.sample_shape)
    batches, eps = golden.tensor(f"{prefix}in/x", dtype), golden.tensor(f"{prefix}in/eps", dtype)
    prior = None if plain else golden.tensor(f"{prefix}in/noise", dtype)

    def noise(i: int) -> dict[str, Tensor]:
        if prior is None:
            return {"z_post": eps[i].reshape(-1, *net.model.prior.shape)}
        return dict(zip(layout.noise, eps[i], strict=True)) | {"z_prior": prior[i]}

    logged: list[dict[str, Tensor]] = []
    with comparing(golden, dtype) as compare:
        deterministic = []  # the 2-D code logs the error of reconstructions from mu before each iteration
        watch = f"{prefix}out/E/loss_rec_det" in golden
        if watch:
            deterministic.append(_deterministic(net, batches[0]))
        for i, step in enumerate(train(net, objective, rates, batches, noise)):
            logged.append(_plain_terms(objective, step) if plain else _terms(objective, layout, step))
            if watch and i + 1 < len(batches):
                deterministic.append(_deterministic(net, batches[i + 1]))
            if i == 0:
                gradients = step.gradients["joint"] if plain else {**step.gradients[ENCODER], **step.gradients[DECODER]}
                for recorded, player in (("gradE/", "encoder."), ("gradD/", "decoder.")):
                    mine = {name: g for name, g in gradients.items() if name.startswith(player)}
                    compare.gradients(prefix + recorded, mine)
                _activations(compare, prefix, step)
            if golden.under(f"{prefix}sd_after{i + 1}/"):
                compare.updated(f"{prefix}sd_after{i + 1}/", net.state(), rates)
        if watch:
            for entry, value in zip(logged, deterministic, strict=True):
                entry["E/loss_rec_det"] = value
        for name in logged[0]:
            series = torch.stack([entry[name] for entry in logged])
            compare.both(f"{prefix}out/{name}", f"{prefix}out32/{name}", series, "loss")
        if f"{prefix}params_without_grad" in golden:
            recorded_names = set(golden.array(f"{prefix}params_without_grad").tolist())
            assert recorded_names == set(net.dropped), "every parameter here gets a gradient, the dropped ones never"


def _deterministic(net: Net, x: Tensor) -> Tensor:
    with torch.no_grad():
        return (net.model.decode(net.model.encode(x).mu) - x).square().flatten(1).sum(1).mean()


def _plain_terms(objective: SoftIntroVae, step: Step) -> dict[str, Tensor]:
    return {
        "loss_rec": objective.reduce * step.mean("joint", "rec"),
        "loss_kl": step.mean("joint", "kl_real"),
        "loss": step.mean("joint", "loss"),
    }


def _terms(objective: SoftIntroVae, layout: Layout, step: Step) -> dict[str, Tensor]:
    c = objective.config
    out = {name: step.mean(*where) for name, where in layout.values.items()}
    for name in layout.averaged:
        out[name] = out[name] * objective.reduce
    real_kl = step.mean(ENCODER, "kl_real")
    rows = {name: step.terms[phase][term] for name, (phase, term) in layout.rows.items()}
    derived = {
        "E/lossE_real": objective.scale * (c.beta_rec * out["E/loss_rec"] + c.beta_kl * real_kl),
        "E/lossE_fake": 0.25 * (step.mean(ENCODER, "exp_elbo_rec") + step.mean(ENCODER, "exp_elbo_fake")),
        "diff_kl": step.mean(DECODER, "kl_fake") - real_kl,
    }
    return out | rows | derived


def _activations(compare: Any, prefix: str, step: Step) -> None:
    """First-iteration tensors.

    Encoder calls: real, rec, fake in the first phase, rec, fake in the second. Decoder calls in each phase: fake, rec,
    then rec_rec and rec_fake, which decode z_rec and z_fake.
    """
    recorded = compare.golden.under(f"{prefix}act/")
    if not recorded:
        return
    calls = dict(zip(("E/real", "E/rec", "E/fake", "D/rec", "D/fake"), step.posteriors, strict=True))
    mine = {f"{call}_mu": q.mu for call, q in calls.items()} | {f"{call}_logvar": q.logvar for call, q in calls.items()}
    for phase, four in (("E", step.decoded[:4]), ("D", step.decoded[4:])):
        (_, fake), (z, rec), (z_rec, _), (z_fake, _) = four
        mine |= {f"{phase}/fake": fake, f"{phase}/z": z, f"{phase}/rec": rec}
        mine |= {f"{phase}/z_rec": z_rec, f"{phase}/z_fake": z_fake}
    for name, key in recorded.items():
        compare.close(key, mine[name], "forward")
