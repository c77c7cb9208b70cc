"""The modulated style networks: StyleGAN2's generator as decoder, its discriminator's residual body as encoder."""

from sivae_dist.models.modulated.config import ModulatedAutoencoder, ModulatedConfig

__all__ = ["ModulatedAutoencoder", "ModulatedConfig"]
