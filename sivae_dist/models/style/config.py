"""The style-based autoencoder, and its configuration."""

from __future__ import annotations

from dataclasses import dataclass, replace

from sivae_dist.models.base import Autoencoder, ModelConfig
from sivae_dist.models.posterior import Prior
from sivae_dist.models.style.decoder import StyleDecoder
from sivae_dist.models.style.encoder import StyleEncoder
from sivae_dist.models.style.settings import StyleSettings


class StyleAutoencoder(Autoencoder):
    """Grows: level 0 is 4x4 pixels, each further level twice as wide. Built at its finest level."""

    stochastic = True
    encoder: StyleEncoder
    decoder: StyleDecoder

    def __init__(self, config: StyleSettings) -> None:
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
class StyleConfig(StyleSettings, ModelConfig):
    """Style-based autoencoder for square images. Defaults: the published FFHQ and CelebA-HQ network at 256 pixels."""

    name: str = "style"

    @classmethod
    def tiny(cls) -> StyleConfig:
        """A small instance for tests."""
        return cls(image_size=16, startf=4, maxf=6, latent_size=5, mapping_layers=2, truncation_cutoff=3)

    def at_resolution(self, size: int) -> StyleConfig:
        """startf goes with 1 / size: as published, every level keeps its width."""
        return replace(self, image_size=size, startf=max(1, self.startf * self.image_size // max(1, size)))

    def build(self) -> StyleAutoencoder:
        """A freshly initialised network: weights normal with standard deviation gain / sqrt(fan in), constant one,
        biases and noise weights zero.
        """
        self.check()
        return StyleAutoencoder(self)
