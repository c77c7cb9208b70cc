"""The encoder: reads channel statistics off every layer and adds up what they say about the style."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from sivae_dist.models.blocks import Block
from sivae_dist.models.posterior import Posterior
from sivae_dist.models.style.layers import (
    Conv1x1,
    Conv3x3,
    ConvDown,
    Linear,
    Mapping,
    blur,
    leaky,
    lr_multipliers,
    wide,
)
from sivae_dist.models.style.settings import StyleSettings
from sivae_dist.ops import adain_act

EPS = 1e-5  # of the encoder's instance norms


class FromRgb(Block, Conv1x1):
    """The image as input of a block, (B, C, H, W) -> (B, width, H, W). LeakyReLU acts twice (slope 0.04 in the end), as
    published.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Convolution and both."""
        return leaky(leaky(super().forward(x)))


class EncoderBlock(Block):
    """x (B, width_in, H, W) -> features (B, width_out, H/2, W/2), style (B, latent_size)."""

    def __init__(self, width_in: int, width_out: int, latent_size: int, *, fused: bool) -> None:
        super().__init__()
        self.conv_1 = Conv3x3(width_in, width_in)
        self.bias_1 = nn.Parameter(torch.zeros(1, width_in, 1, 1))
        self.style_1 = Linear(2 * width_in, latent_size)
        self.conv_2 = ConvDown(width_in, width_out, fused=fused)
        self.bias_2 = nn.Parameter(torch.zeros(1, width_out, 1, 1))
        self.style_2 = Linear(2 * width_out, latent_size)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Convolution, statistics and norm, blur and convolution, statistics and norm."""
        x, statistics_1 = self._norm(self.conv_1(x), self.bias_1)
        x, statistics_2 = self._norm(self.conv_2(blur(x)), self.bias_2)
        return x, wide(self.style_1(statistics_1)) + wide(self.style_2(statistics_2))

    @staticmethod
    def _norm(x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """LeakyReLU(x + bias), normalised; and its (mean, std) over space, (B, 2 C)."""
        x_hat, mean, std = adain_act(x, bias=bias.flatten(), eps=EPS)
        return x_hat, torch.cat([mean, std], dim=1)


class StyleEncoder(nn.Module):
    """x (B, C, S, S) with S = 4 * 2^level -> Posterior over (B, latent_size)."""

    def __init__(self, config: StyleSettings) -> None:
        super().__init__()
        layers, latent = config.layer_count, config.latent_size
        widths = [min(config.maxf, config.startf * 2**i) for i in range(layers + 1)]
        self.from_rgb = nn.ModuleList(FromRgb(config.channels_in, width) for width in widths[:-1])
        self.blocks = nn.ModuleList(
            EncoderBlock(widths[i], widths[i + 1], latent, fused=config.is_fused(layers - 1 - i)) for i in range(layers)
        )
        self.mapping = Mapping([latent, latent, latent, 2 * latent])
        self.level, self.blend = layers - 1, 1.0

    def lr_multipliers(self) -> dict[str, float]:
        """Parameter name -> learning-rate multiplier; parameters that are not named count 1."""
        return lr_multipliers(self)

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Posterior:
        """Encodes. There is no conditional variant."""
        return self.posterior(self.read_style(x))

    def posterior(self, style: Tensor) -> Posterior:
        """style (B, latent_size) -> Posterior: the first half of the mapping's output is mu, the second logvar."""
        mu, logvar = self.mapping(style).chunk(2, dim=1)
        return Posterior(mu, logvar)

    def read_style(self, x: Tensor) -> Tensor:
        """The sum of all layers' contributions, (B, latent_size)."""
        size = 4 << self.level
        if x.shape[2:] != (size, size):
            raise ValueError(
                f"images of {tuple(x.shape[2:])} pixels for an encoder at level {self.level}: {size} wanted"
            )
        first = len(self.blocks) - 1 - self.level
        h: Tensor
        style: Tensor
        h, style = self.blocks[first](self.from_rgb[first](x))
        if self.blend != 1:
            below = self.from_rgb[first + 1](functional.avg_pool2d(x, 2))
            h, style = torch.lerp(below, h, self.blend), style * self.blend
        for block in self.blocks[first + 1 :]:
            h, contribution = block(h)
            style = style + contribution
        return style
