"""Architectures, one file (or folder) a family."""

from sivae_dist.models.averages import running_averages, unmoved
from sivae_dist.models.base import Autoencoder, DecoderDraws, ModelConfig
from sivae_dist.models.posterior import Posterior, Prior

__all__ = ["Autoencoder", "DecoderDraws", "ModelConfig", "Posterior", "Prior", "running_averages", "unmoved"]
