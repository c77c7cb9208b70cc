"""Weights for new data, measured: a short plain VAE, then the margin and betas that fit its KL.

"It is suggested to pre-train the model with 1 to 2 epochs in the original VAEs form (i.e., alpha = 0) to find the
appropriate configuration of the hyper-parameters for different image sizes" (IntroVAE, section 4.1). The warm-up is an
ordinary run of the engine; what is measured are the terms that the introspective objective itself would see.
"""

from __future__ import annotations

import math
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from sivae_dist import counters
from sivae_dist.data.shard_read import load_manifest
from sivae_dist.data.store import open_store
from sivae_dist.engine.config import RunConfig, from_dict
from sivae_dist.engine.iteration import one_hot, statistics_only_of
from sivae_dist.engine.trainer import Trainer
from sivae_dist.errors import UserError
from sivae_dist.objectives import Draws
from sivae_dist.objectives.introvae import IntroVaeConfig
from sivae_dist.objectives.soft_introvae import SoftIntroVaeConfig

LEAD = 1.5  # where fakes should settle, in units of the KL of real data
ROOM = 1.1  # margin above the 95 % quantile of the KL of real data
ROUGH = 2000  # a warm-up of fewer images is said to be short
MEASURED = 512  # images that are measured after the warm-up
WIDTHS = (64, 128, 256, 512)  # published widths from full resolution down; the last one repeats
BOTTOM = 4  # pixels a side of the smallest map, as published


@dataclass(frozen=True)
class Measured:
    """What the warm-up showed. KL in nats; rec in squared input units, summed over a sample's dimensions.

    nimg: images of the warm-up; dimensions: size of a sample; q95: what 95 % of the images stay below.
    """

    nimg: int
    dimensions: int
    zdim: int
    rec: float
    rec_fake: float
    kl_real: float
    kl_real_q95: float
    kl_rec: float
    kl_fake: float
    fakes_below_q95: float


@dataclass(frozen=True)
class Proposal:
    """An `objective` section and why, in plain words."""

    objective: dict[str, Any]
    reasons: list[str]
    warnings: list[str] = field(default_factory=list)


def default_model(url: str, width: float) -> dict[str, Any]:
    """The `model` section that fits a shard folder: published widths times `width`, down to about 4 x 4."""
    manifest = load_manifest(open_store(url))
    halvings = int(math.log2(manifest.resolution / BOTTOM)) if manifest.resolution >= 2 * BOTTOM else 1
    while manifest.resolution % 2**halvings:
        halvings -= 1
    if halvings < 1:
        raise UserError(
            f"{url} holds pictures of {manifest.resolution} pixels, which cannot be halved",
            "pack them at an even resolution, best a power of two",
        )
    channels = [max(4, round(width * WIDTHS[min(level, len(WIDTHS) - 1)])) for level in range(halvings)]
    zdim = 128 if manifest.resolution <= 32 else 256 if manifest.resolution <= 256 else 512
    return {
        "image_size": manifest.resolution,
        "channels_in": manifest.channels,
        "channels": channels,
        "zdim": max(16, round(width * zdim)),
    }


def warm_up_config(values: dict[str, Any], source: str, *, images: int, minutes: float) -> RunConfig:
    """The configuration of the warm-up: that of the run to be, with a plain VAE of the same weights."""
    wanted = from_dict(values, source)
    if wanted.progressive.enabled:
        raise UserError(
            f"{source}: progressive.enabled is True, and a growing model has a KL at each resolution, with a beta_neg "
            "for each in progressive.beta_neg",
            "measure with progressive.enabled False (the model at its full resolution), and give the beta_neg that is "
            "proposed as the last of progressive.beta_neg",
        )
    weights = {key: getattr(wanted.objective, key, 1.0) for key in ("beta_rec", "beta_kl")}
    rec_loss = getattr(wanted.objective, "rec_loss", "mse")
    vae = from_dict({"objective": {"name": "vae", "rec_loss": rec_loss, **weights}}, source).objective
    return replace(
        wanted,
        objective=vae,
        train=replace(wanted.train, kimg=images / 1000, minutes=minutes),
        tracking=replace(wanted.tracking, images_every_kimg=0, tensorboard=False),
        eval=replace(wanted.eval, every_kimg=0, at_start=False, images=min(wanted.eval.images, 64)),
        checkpoint=replace(wanted.checkpoint, every_kimg=1e9, best=None),
        controller=replace(wanted.controller, enabled=False),
    )


def measure(config: RunConfig, folder: Path | None = None) -> Measured:
    """Runs the warm-up (in `folder`, or one that is removed afterwards) and measures on images that come next."""
    if folder is None:
        with tempfile.TemporaryDirectory(prefix="sivae-suggest-") as name:
            return measure(config, Path(name))
    trainer = Trainer(config, folder, "never")
    try:
        trainer.run()
        return _measure(trainer)
    finally:
        trainer.release()


@torch.no_grad()
def _measure(trainer: Trainer) -> Measured:
    """The terms of the introspective encoder phase, with batch statistics as in training; nothing is moved."""
    config, model = trainer.config, trainer.model
    objective = SoftIntroVaeConfig(rec_loss=getattr(config.objective, "rec_loss", "mse")).build(model.sample_shape)
    stream = config.data.at(model.finest_shape).build(seed=config.train.seed, salt=trainer.salt, rank=0, ranks=1)
    parts: dict[str, list[torch.Tensor]] = {}
    model.train()
    try:
        batches = stream.batches(trainer.nimg, config.train.batch)
        with statistics_only_of(model, ()):
            for _ in range(-(-MEASURED // config.train.batch)):
                batch = next(batches).to(trainer.device, model.input_range)
                condition = one_hot(batch.label, model.condition_dim, batch.x)
                players = trainer.iteration.precision.players(model, condition)

                def noise(name: str, position: torch.Tensor = batch.position) -> torch.Tensor:
                    key = counters.key(config.train.seed, "suggest", name)
                    return counters.normal(key, position, model.prior.shape, torch.float32).to(trainer.device)

                for name, value in objective.encoder_loss(players, batch.x, Draws(noise), {}).named.items():
                    parts.setdefault(name, []).append(value.double().cpu())
    finally:
        stream.close()
    terms = {name: torch.cat(values) for name, values in parts.items()}
    if not all(bool(values.isfinite().all()) for values in terms.values()):
        raise UserError(
            f"after {trainer.nimg} images of plain VAE the terms are not finite",
            "lower optim.encoder.lr and optim.decoder.lr in the --config file, or check the data (data verify)",
        )
    q95 = float(terms["kl_real"].quantile(0.95))
    return Measured(
        nimg=trainer.nimg,
        dimensions=math.prod(model.sample_shape),
        zdim=math.prod(model.prior.shape),
        kl_real_q95=q95,
        fakes_below_q95=float((terms["kl_fake"] < ROOM * q95).double().mean()),
        **{name: float(terms[name].median()) for name in ("rec", "rec_fake", "kl_real", "kl_rec", "kl_fake")},
    )


def propose_soft(m: Measured, *, beta_rec: float, beta_kl: float, given: SoftIntroVaeConfig | None = None) -> Proposal:
    """Soft-IntroVAE: the beta_neg with which fakes settle at LEAD times the KL of real data (settling_beta_neg).

    given: alpha, gamma and scale of the run to be, on which that depends; the defaults without it.
    """
    given = given or SoftIntroVaeConfig()
    alpha, target = given.alpha, LEAD * max(m.kl_real, 1.0)
    weighed = replace(given, beta_rec=beta_rec, beta_kl=beta_kl)
    try:
        objective = weighed.build((m.dimensions,))
    except ValueError as error:  # objectives know no UserError
        raise UserError(str(error), "correct the value in the --config file") from error
    wanted = objective.settling_beta_neg(target, m.rec_fake)
    warnings = []
    if math.isclose(wanted, 1 / (alpha * objective.scale * target)):  # the strongest, which is not enough
        warnings.append(
            f"no beta_neg makes fakes settle as high as {target:.3g} nats: the strongest one is proposed; consider a "
            "smaller beta_kl, or fewer latent dimensions"
        )
    beta_neg = _round(wanted)
    reasons = [
        f"beta_rec {beta_rec:g} and beta_kl {beta_kl:g} are those of the warm-up, for which the KL was measured.",
        f"beta_neg {beta_neg:g}: with it the encoder's push on fakes and the decoder's pull balance at a KL of "
        f"{target:.3g} nats, {LEAD:g} times that of real images ({m.kl_real:.3g}). More of it lowers that point: fakes "
        "then count as hopeless and are left alone, and kl_real overtakes kl_fake; much less never pushes at all.",
        f"An image like the real ones would get exp(alpha ELBO) = "
        f"{math.exp(-alpha * objective.scale * (beta_rec * m.rec + beta_neg * m.kl_real)):.2g}.",
    ]
    section = {"name": "soft_introvae", "beta_rec": beta_rec, "beta_kl": beta_kl, "beta_neg": beta_neg}
    return Proposal(section, reasons, warnings)


def propose_hinge(m: Measured, *, beta_rec: float, beta_kl: float) -> Proposal:
    """IntroVAE: a margin that the KL of real data stays below most of the time ("the key", section 4.1)."""
    margin = _round(ROOM * max(m.kl_real_q95, 1.0), up=True)
    beta_neg = IntroVaeConfig().beta_neg
    balance = beta_rec * m.rec / (beta_kl * margin)
    reasons = [
        f"beta_rec {beta_rec:g} and beta_kl {beta_kl:g} are those of the warm-up, for which the KL was measured.",
        f"margin {margin:g}: the KL of 95 % of the real images is below {m.kl_real_q95:.3g} nats, and the paper's "
        f"key is to hold it below the margin. {100 * m.fakes_below_q95:.0f} % of the fakes are below it now and get "
        "pushed up.",
        f"beta_neg {beta_neg:g} (the paper's alpha = {beta_neg / 2:g}), as in all published recipes but one.",
    ]
    warnings = []
    if not 0.2 <= balance <= 5:
        warnings.append(
            f"beta_rec x rec is {beta_rec * m.rec:.3g}, {balance:.2g} times the margin; in the published recipes the "
            f"two are of one order. Run suggest again with --beta-rec {_round(beta_rec / balance):g} (the KL changes "
            "with it)"
        )
    objective = {
        "name": "introvae",
        "beta_rec": beta_rec,
        "beta_kl": beta_kl,
        "beta_neg": beta_neg,
        "margin": margin,
    }
    return Proposal(objective, reasons, warnings)


def describe(m: Measured) -> list[str]:
    """What was measured, in plain words."""
    lines = [
        f"After {m.nimg} images of plain VAE ({m.dimensions} data dimensions, {m.zdim} latent ones), medians:",
        f"  rec      {m.rec:.4g}, which is {m.rec / m.dimensions:.2g} a dimension",
        f"  kl_real  {m.kl_real:.4g} nats (95 % of the images below {m.kl_real_q95:.4g})",
        f"  kl_rec   {m.kl_rec:.4g} nats, of encoded reconstructions",
        f"  kl_fake  {m.kl_fake:.4g} nats, of encoded samples, which the encoder was not trained on",
    ]
    if m.nimg < ROUGH:
        lines.append(f"  That is little: below {ROUGH} images take what follows as rough. More: --minutes, --images.")
    if m.kl_real < 1:
        lines.append("  The KL is below one nat: the code carries almost nothing. Raise --beta-rec, or train longer.")
    return lines


def suggest(
    values: dict[str, Any], source: str, *, objective: str, images: int, minutes: float, folder: Path | None
) -> tuple[list[str], dict[str, Any]]:
    """Warm-up, measurement, proposals: the text to show, and the config to write (with `objective` chosen)."""
    config = warm_up_config(values, source, images=images, minutes=minutes)
    weights = {key: getattr(config.objective, key) for key in ("beta_rec", "beta_kl")}
    wanted = from_dict(values, source).objective
    given = wanted if isinstance(wanted, SoftIntroVaeConfig) else None
    measured = measure(config, folder)
    lines = describe(measured)
    chosen: dict[str, Any] = {}
    for title, proposal in (
        ("Soft-IntroVAE", propose_soft(measured, **weights, given=given)),
        ("IntroVAE", propose_hinge(measured, **weights)),
    ):
        settings = ", ".join(f"{key}: {value}" for key, value in proposal.objective.items())
        lines += ["", f"{title}: objective: {{{settings}}}"]
        lines += [f"  - {text}" for text in proposal.reasons] + [f"  ! {text}" for text in proposal.warnings]
        if proposal.objective["name"] == objective:
            chosen = proposal.objective
    floor = _round(0.1 * max(measured.kl_real, 1.0))
    lines += ["", f"If kl/gap stays near or below 0 in training: controller: {{enabled: true, kl_gap: {floor:g}}}"]
    return lines, {**values, "objective": _above(values.get("objective") or {}, chosen)}


def _above(given: dict[str, Any], chosen: dict[str, Any]) -> dict[str, Any]:
    """The proposal over what the user's file says about this objective (of another one, nothing fits)."""
    same = given.get("name", "soft_introvae") == chosen["name"]
    return {**(given if same else {"rec_loss": given["rec_loss"]} if "rec_loss" in given else {}), **chosen}


def _round(value: float, *, up: bool = False) -> float:
    """Two significant digits."""
    step = 10.0 ** (math.floor(math.log10(value)) - 1)
    return float(f"{(math.ceil(value / step - 1e-9) if up else round(value / step)) * step:.2g}")
