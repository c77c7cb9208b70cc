"""What a model is: two modules, a prior and the range of its input."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from sivae_dist.models.posterior import Posterior, Prior


class Autoencoder(nn.Module):
    """Encoder and decoder with what everyone who handles them must know.

    encoder(x (B, *sample_shape), condition | None) -> Posterior(mu, logvar), each (B, *prior.shape)
    decoder(z (B, *prior.shape), condition | None)  -> x_hat (B, *sample_shape), in `input_range`, not clamped
    condition: (B, condition_dim) one-hot or None; condition_dim 0 means unconditional.
    input_range: (low, high) of the data the model was made for; None where data have no range (2-D points).
    """

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        *,
        prior: Prior,
        sample_shape: tuple[int, ...],
        input_range: tuple[float, float] | None,
        condition_dim: int = 0,
    ) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder, decoder
        self.prior, self.sample_shape, self.input_range = prior, sample_shape, input_range
        self.condition_dim = condition_dim

    def encode(self, x: Tensor, condition: Tensor | None = None) -> Posterior:
        """x (B, *sample_shape) in input_range -> Posterior."""
        posterior: Posterior = self.encoder(x, condition)
        return posterior

    def decode(self, z: Tensor, condition: Tensor | None = None) -> Tensor:
        """z (B, *prior.shape) -> x_hat (B, *sample_shape)."""
        x_hat: Tensor = self.decoder(z, condition)
        return x_hat


@dataclass(frozen=True)
class ModelConfig:
    """Base of every architecture's configuration; `name` selects the class."""

    name: str = ""

    def build(self) -> Autoencoder:
        """A freshly initialised model in float32 on the CPU (the caller seeds torch's generator)."""
        raise NotImplementedError
