"""Soft-IntroVAE (Daniel & Tamar, CVPR 2021): the hinge of IntroVAE becomes exp(alpha ELBO) of generated samples.

The paper's objectives, maximised:
    encoder (E):  ELBO(x) - 1/alpha exp(alpha ELBO(Dec(z)))
    decoder (D):  ELBO(x) + gamma ELBO(Dec(z))
with ELBO = -scale (beta_rec rec + beta_kl kl). Here their negatives are minimised, and with `form = "published"` as the
public code has them: fakes are samples from the prior and reconstructions, the KL within exp() weighs beta_neg, and in
the decoder phase the fakes' reconstruction error (weight gamma_r) sends no gradient through targets or encoder.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from sivae_dist.objectives import terms as t
from sivae_dist.objectives.base import Draws, Gaussian, ObjectiveConfig, Phase, Players, Strength, Terms
from sivae_dist.objectives.vae import RecRealReduction, Vae, VaeConfig, data_reduction

_POSITIVE = ("alpha",)
_NOT_NEGATIVE = ("gamma", "beta_rec", "beta_kl", "beta_neg", "gamma_r", "vae_warmup_kimg")


@dataclass(frozen=True)
class SoftIntroVaeConfig(ObjectiveConfig):
    """Soft-introspective objective. Defaults: the public image code with its CIFAR-10 weights."""

    name: str = "soft_introvae"
    alpha: float = 2.0
    """The paper's alpha: exponent of the soft threshold exp(alpha ELBO) / alpha."""
    gamma: float = 1.0
    """The paper's gamma: weight of the fakes' ELBO in the decoder phase."""
    beta_rec: float = 1.0
    """Weight of the reconstruction error in every ELBO."""
    beta_kl: float = 1.0
    """Weight of the KL in the ELBO of real data, and of the fakes' KL in the decoder phase."""
    beta_neg: float = 256.0
    """Weight of the KL within exp()."""
    gamma_r: float = 1e-8
    """Decoder phase: weight of the fakes' reconstruction error. The published 1e-8 vanishes in float32 but costs two
    decoder passes, which move the running statistics; 0 skips both."""
    scale: float | None = None
    """Factor s of every ELBO; None for 1 / (number of data dimensions); the 2-D experiments use 0.5."""
    rec_loss: t.RecLoss = "mse"
    """mse, l1, or bce (which needs a decoder with output in [0, 1])."""
    rec_real_reduction: RecRealReduction = "sum"
    """sum over the data dimensions everywhere. published: the public code averages l1 and bce over them in the
    real-data and the gamma_r term but sums them within exp(), which changes their ratio by the number of pixels.
    No difference for mse."""
    rec_target: Literal["attached", "detached"] = "attached"
    """Whether the encoder's gradient also flows through the target x_rec of the reconstruction of a reconstruction
    (attached: images, 2-D; detached: 3-D)."""
    decoder_z: Literal["reuse", "fresh_eps", "reencode"] = "reuse"
    """The z of x_rec in the decoder phase: reuse the encoder phase's; fresh_eps on the old posterior (3-D);
    reencode with the updated encoder and fresh noise (style)."""
    draws: Literal["shared", "fresh"] = "shared"
    """The z_prior of the decoder phase, and what the decoder itself draws for it: the encoder phase's (shared), or
    fresh (style)."""
    fake_sources: Literal["prior+rec", "prior"] = "prior+rec"
    """What stands for Dec(z): mean over prior samples and reconstructions, or prior samples alone."""
    form: Literal["published", "paper"] = "published"
    """published, or paper: nothing is stopped and gamma_r has no part (the full ELBO of the fakes counts). With
    fake_sources prior these are the paper's equations to the letter."""
    vae_warmup_kimg: float = 0.0
    """Thousand images of plain VAE first."""
    vae_warmup_scale: Literal["one", "same"] = "same"
    """Factor of the warm-up's loss: the same `scale` as afterwards, or one, as published. With one, the gradients
    shrink by the number of pixels when the warm-up ends: Adam coasts on its old momentum, which can undo what was
    learnt, and then hardly moves until its second moments have decayed."""

    def build(self, sample_shape: tuple[int, ...], **_: Any) -> SoftIntroVae:
        """Raises ValueError for values out of range."""
        for field in _POSITIVE:
            t.require(getattr(self, field) > 0, field, getattr(self, field), "a number > 0")
        for field in _NOT_NEGATIVE:
            t.require(getattr(self, field) >= 0, field, getattr(self, field), "a number >= 0")
        t.require(self.scale is None or self.scale > 0, "scale", self.scale, "a number > 0, or none")
        return SoftIntroVae(self, sample_shape)


@dataclass(frozen=True)
class _Given:
    """A posterior put together from carried tensors."""

    mu: Tensor
    logvar: Tensor


class SoftIntroVae:
    """Encoder phase, decoder phase."""

    def __init__(self, config: SoftIntroVaeConfig, sample_shape: tuple[int, ...]) -> None:
        self.config = config
        self.strength = Strength("beta_neg", config.beta_neg, self.settling_beta_neg)
        self.scale = 1 / math.prod(sample_shape) if config.scale is None else config.scale
        self.reduce = data_reduction(config.rec_loss, config.rec_real_reduction, sample_shape)
        # The order of the sources is that of the public image code, which decides the running statistics.
        self.sources = ("rec", "fake") if config.fake_sources == "prior+rec" else ("fake",)
        again = {"z_prior": config.draws == "shared", "z_post": config.decoder_z == "reuse"}
        self.decoded_again = tuple(name for name, used in again.items() if used)  # by both phases
        self.warmup = Vae(
            VaeConfig(
                beta_rec=config.beta_rec,
                beta_kl=config.beta_kl,
                rec_loss=config.rec_loss,
                rec_real_reduction=config.rec_real_reduction,
                scale=self.scale if config.vae_warmup_scale == "same" else 1.0,
            ),
            sample_shape,
        )

    def phases(self, nimg: int) -> tuple[Phase, ...]:
        """Warm-up, then encoder and decoder."""
        if nimg < 1000 * self.config.vae_warmup_kimg:
            return self.warmup.phases(nimg)
        return (
            Phase("encoder", ("encoder",), self.encoder_loss, decoded_again=self.decoded_again),
            Phase("decoder", ("decoder",), self.decoder_loss),
        )

    def settling_beta_neg(self, kl: float, rec: float = 0.0) -> float:
        """beta_neg with which the KL of fakes settles at `kl`; rec: what their reconstruction error then is.

        The encoder pushes a fake's KL up with scale beta_neg exp(-alpha scale (beta_rec rec + beta_neg kl)), the
        decoder pulls it down with scale gamma beta_kl. They are equal at
            kl = (ln(beta_neg / (gamma beta_kl)) / (alpha scale) - beta_rec rec) / beta_neg,
        which rises up to beta_neg = e gamma beta_kl (for rec = 0) and falls from there on. Of the two solutions this is
        the larger, whose push fades quickly above kl, so that nothing runs away. If no beta_neg reaches kl: the one
        that pushes hardest there.
        """
        c, unit = self.config, 1 / (self.config.alpha * self.scale)
        pull = max(c.gamma * c.beta_kl, 1e-12)

        def surplus(beta_neg: float) -> float:
            return unit * math.log(beta_neg / pull) - c.beta_rec * rec - beta_neg * kl

        low = unit / kl  # where the surplus is greatest
        if surplus(low) <= 0:
            return low
        high = 2 * low
        while surplus(high) > 0:
            high *= 2
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if surplus(middle) > 0 else (low, middle)
        return low

    def _elbo(self, rec: Tensor, kl_: Tensor, beta_kl: float) -> Tensor:
        return t.elbo(rec, kl_, scale=self.scale, beta_rec=self.config.beta_rec, beta_kl=beta_kl)

    def encoder_loss(self, players: Players, x_real: Tensor, draws: Draws, carry: dict[str, Tensor]) -> Terms:
        """-E: -ELBO(x) + 1/alpha exp(alpha ELBO(Dec(z)))."""
        c, prior = self.config, players.prior
        z_prior = t.sample_prior(prior, draws.noise("z_prior"))  # z ~ p(z)
        x_fake = players.decoder(z_prior, "z_prior", from_prior=True)  # Dec(z)
        q_real = players.encoder(x_real)  # q(z|x)
        z_post = t.reparameterize(q_real, draws.noise("z_post"))
        x_rec = players.decoder(z_post, "z_post")

        rec = t.reconstruction(x_real, x_rec, c.rec_loss)
        kl_real = t.kl(q_real, prior)
        loss = -self._elbo(self.reduce * rec, kl_real, c.beta_kl)  # first term of E: -ELBO(x)
        named = t.detached(rec=rec, kl_real=kl_real)

        # Second term of E, a mean over the kinds of fakes: 1/alpha exp(alpha ELBO(Dec(z))).
        fakes, attached = {"rec": x_rec, "fake": x_fake}, c.form == "paper"
        for source in self.sources:
            x = fakes[source]
            q = players.encoder(x if attached else x.detach())  # q(z|Dec(z))
            name = f"encoder/{source}"
            x_again = players.decoder(t.reparameterize(q, draws.noise(name)), name)
            target = x if attached or c.rec_target == "attached" else x.detach()
            rec_again, kl_again = t.reconstruction(target, x_again, c.rec_loss), t.kl(q, prior)
            exp_elbo = t.exp_elbo(self._elbo(rec_again, kl_again, self.strength.value), c.alpha)
            loss = loss + exp_elbo / (c.alpha * len(self.sources))
            parts = {f"rec_{source}": rec_again, f"kl_{source}": kl_again, f"exp_elbo_{source}": exp_elbo}
            named |= t.detached(**parts)

        carried = {"z_post": z_post, "z_prior": z_prior}
        if c.decoder_z == "fresh_eps":
            carried |= {"mu": q_real.mu, "logvar": q_real.logvar}
        if c.form == "paper":
            carried["kl_real"] = kl_real
        return Terms(loss, named, t.detached(**carried))

    def decoder_loss(self, players: Players, x_real: Tensor, draws: Draws, carry: dict[str, Tensor]) -> Terms:
        """-D: -ELBO(x) - gamma ELBO(Dec(z)), with the updated encoder."""
        c, prior = self.config, players.prior
        z_prior, name = carry["z_prior"], "z_prior"
        if c.draws == "fresh":
            name = "decoder/z_prior"
            z_prior = t.sample_prior(prior, draws.noise(name))
        x_fake = players.decoder(z_prior, name, from_prior=True)  # Dec(z)
        z_post, q_real = self._decoder_posterior(players, x_real, draws, carry)
        x_rec = players.decoder(z_post, "z_post" if c.decoder_z == "reuse" else "decoder/z_post")

        rec = t.reconstruction(x_real, x_rec, c.rec_loss)
        loss = self.scale * c.beta_rec * self.reduce * rec  # first term of D: -ELBO(x), whose KL is constant here
        named = t.detached(rec=rec)
        if c.form == "paper":  # the constant, so that the value is that of the equation
            kl_real = carry["kl_real"] if q_real is None else t.kl(q_real, prior).detach()
            loss = loss + self.scale * c.beta_kl * kl_real

        # Second term of D, a mean over the kinds of fakes: -gamma ELBO(Dec(z)).
        fakes = {"rec": x_rec, "fake": x_fake}
        posteriors = {source: players.encoder(fakes[source]) for source in self.sources}
        for source, q in posteriors.items():
            x, name = fakes[source], f"decoder/{source}"
            kl_again = t.kl(q, prior)
            if c.form == "paper":
                x_again = players.decoder(t.reparameterize(q, draws.noise(name)), name)
                rec_again = t.reconstruction(x, x_again, c.rec_loss)
                negative_elbo = -self._elbo(rec_again, kl_again, c.beta_kl)
            else:
                negative_elbo = self.scale * c.beta_kl * kl_again
                if c.gamma_r > 0:
                    x_again = players.decoder(t.reparameterize(q, draws.noise(name)).detach(), name)
                    rec_again = t.reconstruction(x.detach(), x_again, c.rec_loss)
                    weight = self.scale * c.beta_rec * c.gamma_r * self.reduce
                    negative_elbo = negative_elbo + weight * rec_again
            loss = loss + c.gamma / len(self.sources) * negative_elbo
            named |= t.detached(**{f"kl_{source}": kl_again})
            if c.form == "paper" or c.gamma_r > 0:
                named |= t.detached(**{f"rec_{source}": rec_again})
        return Terms(loss, named)

    def _decoder_posterior(
        self, players: Players, x_real: Tensor, draws: Draws, carry: dict[str, Tensor]
    ) -> tuple[Tensor, Gaussian | None]:
        """z of the reconstruction in the decoder phase, and the posterior if x was encoded again."""
        c = self.config
        if c.decoder_z == "reuse":
            return carry["z_post"], None
        if c.decoder_z == "fresh_eps":
            q_old = _Given(carry["mu"], carry["logvar"])
            return t.reparameterize(q_old, draws.noise("decoder/z_post")), None
        q_real = players.encoder(x_real)
        return t.reparameterize(q_real, draws.noise("decoder/z_post")).detach(), q_real
