"""IntroVAE (Huang, Li, He, Sun, Tan, NeurIPS 2018): the hinge objective, algorithm 1, equations 11 and 12.

Symbols:            here          paper          public code
    reconstruction  beta_rec      beta / 2       weight_rec        (eq. 10 has a factor 1/2 that the code lacks)
    KL              beta_kl       1              weight_kl
    adversarial     beta_neg / 2  alpha          weight_neg * 0.5  (0.5: mean over the two kinds of fakes)
    margin          margin        m              m_plus
The code gives the adversarial term of eq. 12 the weight weight_kl * 0.5, without weight_neg; see `decoder_weight`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from sivae_dist.objectives import terms as t
from sivae_dist.objectives.base import Draws, ObjectiveConfig, Phase, Players, Strength, Terms
from sivae_dist.objectives.vae import Vae, VaeConfig

FAKE_SOURCES = 2  # s = r, p in the paper: reconstructions and samples from the prior


@dataclass(frozen=True)
class IntroVaeConfig(ObjectiveConfig):
    """Hinge objective. Defaults: the published 256-px recipe."""

    name: str = "introvae"
    beta_rec: float = 0.05
    """Weight of the reconstruction error (weight_rec in the public code)."""
    beta_kl: float = 1.0
    """Weight of the KL of real data (weight_kl)."""
    beta_neg: float = 0.5
    """Weight of the hinge on fakes (weight_neg; twice the paper's alpha)."""
    margin: float = 120.0
    """m: how far, in nats of KL, the encoder pushes fakes away (m_plus)."""
    hinge: Literal["batch_mean", "per_sample"] = "batch_mean"
    """batch_mean as in the public code, max(0, m - mean of the KL over the whole batch); per_sample as in the
    paper, the mean of max(0, m - KL). With train.accumulation above 1 the batch is a micro-batch (of all ranks)."""
    decoder_weight: Literal["published", "paper"] = "published"
    """Weight of the adversarial term in the decoder phase: published beta_kl / 2, paper beta_kl beta_neg / 2
    (the same as in the encoder phase)."""
    rec_loss: t.RecLoss = "mse"
    """mse as published, l1, or bce (which needs a decoder with output in [0, 1])."""
    vae_warmup_kimg: float = 0.0
    """Thousand images of plain VAE first, with unit weights as published."""

    def build(self, sample_shape: tuple[int, ...], **_: Any) -> IntroVae:
        """Raises ValueError for values out of range."""
        for field in ("beta_rec", "beta_kl", "beta_neg", "margin", "vae_warmup_kimg"):
            t.require(getattr(self, field) >= 0, field, getattr(self, field), "a number >= 0")
        return IntroVae(self, sample_shape)


class IntroVae:
    """Encoder phase, decoder phase."""

    def __init__(self, config: IntroVaeConfig, sample_shape: tuple[int, ...]) -> None:
        self.config = config
        self.strength = Strength("margin", config.margin, settles=lambda kl, rec: kl)  # section 4.3
        self.warmup = Vae(VaeConfig(rec_loss=config.rec_loss), sample_shape)
        neg = config.beta_neg if config.decoder_weight == "paper" else 1.0
        self.encoder_alpha = config.beta_kl * config.beta_neg / FAKE_SOURCES
        self.decoder_alpha = config.beta_kl * neg / FAKE_SOURCES

    def phases(self, nimg: int) -> tuple[Phase, ...]:
        """Warm-up, then encoder and decoder.

        The decoder phase makes x_rec and x_fake once more. The public code keeps them from the encoder phase (the
        decoder has not moved in between, so the values are equal) and its decoder statistics move only there.
        """
        if nimg < 1000 * self.config.vae_warmup_kimg:
            return self.warmup.phases(nimg)
        return (
            Phase("encoder", ("encoder",), self.encoder_loss, decoded_again=("z_prior", "z_post")),
            Phase("decoder", ("decoder",), self.decoder_loss, statistics=("encoder",)),
        )

    def hinge(self, kl_fake: Tensor, draws: Draws) -> Tensor:
        """(B,), mean over the batch = [m - .]+ of eq. 11.

        batch_mean: the gate is open for the whole batch or for none of it. Gating each sample's m - KL keeps the loss a
        sum over samples, so value and gradient do not depend on how the batch is split over ranks.
        """
        distance = self.strength.value - kl_fake
        if self.config.hinge == "per_sample":
            return distance.clamp(min=0)
        return (draws.batch_mean(distance) > 0) * distance

    def encoder_loss(self, players: Players, x_real: Tensor, draws: Draws, carry: dict[str, Tensor]) -> Terms:
        """Eq. 11, lines 4 to 10 of algorithm 1."""
        c, prior = self.config, players.prior
        z_prior = t.sample_prior(prior, draws.noise("z_prior"))  # Zp ~ p(z)
        x_fake = players.decoder(z_prior, "z_prior", from_prior=True)  # Xp = Dec(Zp)
        q_real = players.encoder(x_real)  # Z = Enc(X)
        z_post = t.reparameterize(q_real, draws.noise("z_post"))
        x_rec = players.decoder(z_post, "z_post")  # Xr = Dec(Z)

        rec = t.reconstruction(x_real, x_rec, c.rec_loss)  # L_AE, eq. 10
        kl_real = t.kl(q_real, prior)  # L_REG(Z), eq. 9
        kl_rec = t.kl(players.encoder(x_rec.detach()), prior)  # L_REG(Enc(ng(Xr)))
        kl_fake = t.kl(players.encoder(x_fake.detach()), prior)  # L_REG(Enc(ng(Xp)))

        adversarial = self.hinge(kl_rec, draws) + self.hinge(kl_fake, draws)  # sum over s = r, p of [m - L_REG]+
        loss = c.beta_kl * kl_real + self.encoder_alpha * adversarial + c.beta_rec * rec  # eq. 11
        named = t.detached(rec=rec, kl_real=kl_real, kl_rec=kl_rec, kl_fake=kl_fake)
        return Terms(loss, named, t.detached(z_post=z_post, z_prior=z_prior))

    def decoder_loss(self, players: Players, x_real: Tensor, draws: Draws, carry: dict[str, Tensor]) -> Terms:
        """Eq. 12, lines 11 to 13 of algorithm 1: the same Xr and Xp, the updated encoder."""
        c, prior = self.config, players.prior
        x_fake = players.decoder(carry["z_prior"], "z_prior", from_prior=True)
        x_rec = players.decoder(carry["z_post"], "z_post")
        rec = t.reconstruction(x_real, x_rec, c.rec_loss)  # L_AE
        kl_rec = t.kl(players.encoder(x_rec), prior)  # L_REG(Enc(Xr))
        kl_fake = t.kl(players.encoder(x_fake), prior)  # L_REG(Enc(Xp))
        loss = self.decoder_alpha * (kl_rec + kl_fake) + c.beta_rec * rec  # eq. 12
        return Terms(loss, t.detached(rec=rec, kl_rec=kl_rec, kl_fake=kl_fake))
