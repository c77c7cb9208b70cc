"""Settings of the style-based autoencoder: what its two networks are built from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sivae_dist.models.style.checks import check_styled
from sivae_dist.models.style.layers import FUSED_FROM
from sivae_dist.models.style.styled import AverageUpdates

Noise = Literal["random", "batch_constant", "fixed", "off", "published_bump"]


@dataclass(frozen=True)
class StyleSettings:
    """See StyleConfig, which builds it all."""

    channels_in: int = 3
    """Image channels."""
    image_size: int = 256
    """Pixels a side at the finest level: a power of two, 8 or more."""
    startf: int = 64
    """Feature maps at the finest level; doubled at each coarser one."""
    maxf: int = 512
    """Feature maps at most."""
    latent_size: int = 512
    """Latent dimensions, of z and of a style."""
    mapping_layers: int = 8
    """Layers of the network that maps z to a style (the one behind the encoder has three, as published)."""
    input_range: tuple[float, float] = (-1.0, 1.0)
    """What black and white become; part of the model, so of its checkpoints."""
    noise: Noise = "random"
    """Noise maps that the decoder adds: random (one a sample, drawn for each call), batch_constant (one for a whole
    batch), fixed (always the same), off, or published_bump (what the public code does when told to use no noise).
    Where nobody hands the decoder draws (decoding for a user), the first two become fixed."""
    style_mixing_prob: float = 0.9
    """Training: how often a batch of prior samples takes its finer layers' style from a second z; 0 never."""
    dlatent_avg_beta: float = 0.995
    """Weight of the old value when the average style is updated, which truncation needs."""
    dlatent_avg_updates: AverageUpdates = "training"
    """What moves the average style: every decoding in training, or published: every decoding, of evaluation too."""
    truncation_cutoff: int = 8
    """Layers, from the coarsest (two a level), on which truncation acts when sampling asks for it."""

    @property
    def layer_count(self) -> int:
        """Levels: 4x4 pixels, 8x8, ... image_size."""
        return self.image_size.bit_length() - 2

    def is_fused(self, level: int) -> bool:
        """Whether the block between this level and the one below resamples within its convolution, as published."""
        return level > 0 and 4 << level >= FUSED_FROM

    def check(self) -> None:
        """Raises UserError for values that make no network."""
        check_styled(self, "startf", "maxf")
