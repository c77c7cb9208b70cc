"""The modulated autoencoder, and its configuration."""

from __future__ import annotations

from dataclasses import dataclass

from sivae_dist.models.base import Autoencoder, ModelConfig
from sivae_dist.models.modulated.decoder import ModulatedDecoder
from sivae_dist.models.modulated.encoder import ModulatedEncoder
from sivae_dist.models.modulated.settings import ModulatedSettings
from sivae_dist.models.posterior import Prior


class ModulatedAutoencoder(Autoencoder):
    """Trains at its one resolution from the start."""

    stochastic = True
    encoder: ModulatedEncoder
    decoder: ModulatedDecoder

    def __init__(self, config: ModulatedSettings) -> None:
        super().__init__(
            ModulatedEncoder(config),
            ModulatedDecoder(config),
            prior=Prior((config.latent_size,)),
            sample_shape=(config.channels_in, config.image_size, config.image_size),
            input_range=config.input_range,
        )


@dataclass(frozen=True)
class ModulatedConfig(ModulatedSettings, ModelConfig):
    """Style-based autoencoder with modulated convolutions, for square images.

    The decoder is the skip generator of StyleGAN2 (Karras et al., CVPR 2020), without path length regularisation (part
    of a loss); the encoder is shaped like its residual discriminator, without minibatch statistics, and ends in mu and
    logvar. Nobody published the two as an introspective VAE.
    """

    name: str = "modulated"

    @classmethod
    def tiny(cls) -> ModulatedConfig:
        """A small instance for tests."""
        return cls(image_size=16, channel_base=64, channel_max=6, latent_size=5, mapping_layers=2, truncation_cutoff=3)

    def build(self) -> ModulatedAutoencoder:
        """A freshly initialised network: weights normal with standard deviation gain / sqrt(fan in), the constant
        normal, styles `style_spread` around one, the posterior close to the prior, other biases and noise strengths
        zero.
        """
        self.check()
        return ModulatedAutoencoder(self)
