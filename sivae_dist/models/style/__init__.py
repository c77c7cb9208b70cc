"""The style-based autoencoder (ALAE; Pidhorskyi, Adjeroh, Doretto, CVPR 2020) as Soft-IntroVAE trains it."""

from sivae_dist.models.style.config import StyleAutoencoder, StyleConfig

__all__ = ["StyleAutoencoder", "StyleConfig"]
