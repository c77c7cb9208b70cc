"""The plain variational autoencoder (Kingma & Welling 2014), also the warm-up of the introspective objectives."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from sivae_dist.objectives import terms as t
from sivae_dist.objectives.base import Draws, ObjectiveConfig, Phase, Players, Strength, Terms

RecRealReduction = Literal["sum", "published"]


@dataclass(frozen=True)
class VaeConfig(ObjectiveConfig):
    """Negative ELBO. Defaults: the published warm-up (mse, unit weights, no scale)."""

    name: str = "vae"
    beta_rec: float = 1.0
    """Weight of the reconstruction error."""
    beta_kl: float = 1.0
    """Weight of the KL."""
    scale: float | None = 1.0
    """Factor of the whole loss; None for 1 / (number of data dimensions)."""
    rec_loss: t.RecLoss = "mse"
    """mse, l1, or bce (which needs a decoder with output in [0, 1])."""
    rec_real_reduction: RecRealReduction = "sum"
    """sum over the data dimensions; published: the mean over them for l1 and bce, as the public code has it."""

    def build(self, sample_shape: tuple[int, ...], **_: Any) -> Vae:
        """Raises ValueError for values out of range."""
        for field in ("beta_rec", "beta_kl"):
            t.require(getattr(self, field) >= 0, field, getattr(self, field), "a number >= 0")
        t.require(self.scale is None or self.scale > 0, "scale", self.scale, "a number > 0, or none")
        return Vae(self, sample_shape)


def data_reduction(kind: t.RecLoss, reduction: RecRealReduction, sample_shape: tuple[int, ...]) -> float:
    """Factor of the mean reconstruction term: 1, or 1/pixels where the public code averages l1 and bce over pixels."""
    return 1 / math.prod(sample_shape) if reduction == "published" and kind != "mse" else 1.0


class Vae:
    """One phase that trains both players."""

    def __init__(self, config: VaeConfig, sample_shape: tuple[int, ...]) -> None:
        self.config = config
        self.strength: Strength | None = None
        self.scale = 1 / math.prod(sample_shape) if config.scale is None else config.scale
        self.reduce = data_reduction(config.rec_loss, config.rec_real_reduction, sample_shape)

    def phases(self, nimg: int) -> tuple[Phase, ...]:
        """The joint phase, whatever nimg."""
        return (Phase("joint", ("encoder", "decoder"), self.joint_loss),)

    def joint_loss(self, players: Players, x_real: Tensor, draws: Draws, carry: dict[str, Tensor]) -> Terms:
        """-ELBO(x), single-sample estimate."""
        c = self.config
        q_real = players.encoder(x_real)
        x_rec = players.decoder(t.reparameterize(q_real, draws.noise("z_post")), "z_post")
        rec = t.reconstruction(x_real, x_rec, c.rec_loss)
        kl_real = t.kl(q_real, players.prior)
        loss = -t.elbo(self.reduce * rec, kl_real, scale=self.scale, beta_rec=c.beta_rec, beta_kl=c.beta_kl)
        return Terms(loss, t.detached(rec=rec, kl_real=kl_real))
