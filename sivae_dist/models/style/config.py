"""Configuration of the style-based autoencoder, and the autoencoder itself."""

from __future__ import annotations

from dataclasses import dataclass, replace

from sivae_dist.models.base import Autoencoder, ModelConfig
from sivae_dist.models.posterior import Prior
from sivae_dist.models.style.checks import check_styled
from sivae_dist.models.style.decoder import Noise, StyleDecoder
from sivae_dist.models.style.encoder import StyleEncoder
from sivae_dist.models.style.layers import FUSED_FROM
from sivae_dist.models.style.styled import AverageUpdates


class StyleAutoencoder(Autoencoder):
    """Grows: level 0 is 4x4 pixels, each further level twice as wide. Built at its finest level."""

    stochastic = True
    encoder: StyleEncoder
    decoder: StyleDecoder

    def __init__(self, config: StyleConfig) -> None:
        super().__init__(
            StyleEncoder(config),
            StyleDecoder(config),
            prior=Prior((config.latent_size,)),
            sample_shape=(config.channels_in, config.image_size, config.image_size),
            input_range=config.input_range,
        )
        self.levels = config.layer_count

    def set_level(self, level: int, blend: float = 1.0) -> None:
        """See Autoencoder.set_level."""
        super().set_level(level, blend)
        self.encoder.level = self.decoder.level = level
        self.encoder.blend = self.decoder.blend = float(blend)
        self.sample_shape = (self.sample_shape[0], 4 << level, 4 << level)


@dataclass(frozen=True)
class StyleConfig(ModelConfig):
    """Style-based autoencoder for square images. Defaults: the published FFHQ and CelebA-HQ network at 256 pixels."""

    name: str = "style"
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

    @classmethod
    def tiny(cls) -> StyleConfig:
        """A small instance for tests."""
        return cls(image_size=16, startf=4, maxf=6, latent_size=5, mapping_layers=2, truncation_cutoff=3)

    @property
    def layer_count(self) -> int:
        """Levels: 4x4 pixels, 8x8, ... image_size."""
        return self.image_size.bit_length() - 2

    def at_resolution(self, size: int) -> StyleConfig:
        """startf goes with 1 / size: as published, every level keeps its width."""
        return replace(self, image_size=size, startf=max(1, self.startf * self.image_size // max(1, size)))

    def is_fused(self, level: int) -> bool:
        """Whether the block between this level and the one below resamples within its convolution, as published."""
        return level > 0 and 4 << level >= FUSED_FROM

    def check(self) -> None:
        """Raises UserError for values that make no network."""
        check_styled(self, "startf", "maxf")

    def build(self) -> StyleAutoencoder:
        """A freshly initialised network: weights normal with standard deviation gain / sqrt(fan in), constant one,
        biases and noise weights zero.
        """
        self.check()
        return StyleAutoencoder(self)
