"""The fully connected autoencoder of the 2-D experiments of Soft-IntroVAE."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from sivae_dist.errors import UserError
from sivae_dist.models.base import Autoencoder, ModelConfig
from sivae_dist.models.posterior import Posterior, Prior
from sivae_dist.ops.mlp import mlp


def make_layers(size_in: int, width: int, hidden_layers: int, size_out: int) -> nn.Sequential:
    """Linear, ReLU; hidden_layers times linear, ReLU; linear. The linear layers are input, hidden_1, ..., output."""
    layers = nn.Sequential()
    layers.add_module("input", nn.Linear(size_in, width))
    layers.add_module("input_relu", nn.ReLU())
    for i in range(1, hidden_layers + 1):
        layers.add_module(f"hidden_{i}", nn.Linear(width, width))
        layers.add_module(f"hidden_{i}_relu", nn.ReLU())
    layers.add_module("output", nn.Linear(width, size_out))
    return layers


def _through(layers: nn.Sequential, x: Tensor) -> Tensor:
    """What `layers(x)` gives, by an operator that has a faster way."""
    linear = [layer for layer in layers if isinstance(layer, nn.Linear)]
    return mlp(x, [layer.weight for layer in linear], [layer.bias for layer in linear])


class MlpEncoder(nn.Module):
    """x (B, x_dim) -> Posterior over (B, zdim)."""

    def __init__(self, config: MlpConfig) -> None:
        super().__init__()
        self.layers = make_layers(config.x_dim, config.width, config.hidden_layers, 2 * config.zdim)

    def shard_units(self) -> list[nn.Module]:
        """None but the player itself: its layers are used by their weights, not called (see distributed/fsdp2)."""
        return []

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Posterior:
        """Encodes; the first half of the output is mu, the second logvar. There is no conditional variant."""
        mu, logvar = _through(self.layers, x).chunk(2, dim=1)
        return Posterior(mu, logvar)


class MlpDecoder(nn.Module):
    """z (B, zdim) -> x_hat (B, x_dim), unbounded."""

    def __init__(self, config: MlpConfig) -> None:
        super().__init__()
        self.layers = make_layers(config.zdim, config.width, config.hidden_layers, config.x_dim)

    def shard_units(self) -> list[nn.Module]:
        """As the encoder's."""
        return []

    def forward(self, z: Tensor, condition: Tensor | None = None) -> Tensor:
        """Decodes."""
        return _through(self.layers, z)


@dataclass(frozen=True)
class MlpConfig(ModelConfig):
    """Multilayer perceptrons for points. Defaults: the published 2-D network.

    Its decoder also owns an unused scalar `loggamma`, which is left out.
    """

    name: str = "mlp"
    fused_operators: ClassVar[bool] = False
    x_dim: int = 2
    """Coordinates a point."""
    zdim: int = 2
    """Latent dimensions."""
    width: int = 256
    """Units a layer."""
    hidden_layers: int = 3
    """Layers from width to width, besides the first and the last."""

    @classmethod
    def tiny(cls) -> MlpConfig:
        """A small instance for tests."""
        return cls(width=8, hidden_layers=1)

    def build(self) -> Autoencoder:
        """A freshly initialised network (torch's default initialisation, as published). Points have no input range."""
        for field, least in (("x_dim", 1), ("zdim", 1), ("width", 1), ("hidden_layers", 0)):
            if getattr(self, field) < least:
                raise UserError(f"model.{field} is {getattr(self, field)}, expected {least} or more", "raise it")
        return Autoencoder(
            MlpEncoder(self),
            MlpDecoder(self),
            prior=Prior((self.zdim,)),
            sample_shape=(self.x_dim,),
            input_range=None,
        )
