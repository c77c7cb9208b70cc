"""The decoder: a learned constant, grown to an image, every layer shifted and scaled by the style (AdaIN)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from sivae_dist.models.base import DecoderDraws
from sivae_dist.models.blocks import Block
from sivae_dist.models.style.layers import (
    Conv1x1,
    Conv3x3,
    ConvUp,
    Linear,
    Mapping,
    blur,
    wide,
)
from sivae_dist.models.style.settings import Noise, StyleSettings
from sivae_dist.models.style.styled import StyledDecoder, noise_map
from sivae_dist.ops import adain_act

EPS = 1e-8  # of the decoder's instance norms
TO_RGB_GAIN = 0.03
STYLE_GAIN = 1.0


class DecoderBlock(Block):
    """x (B, width_in, H, W), two styles (B, latent_size) -> (B, width_out, 2 H, 2 W); the first keeps the size."""

    def __init__(self, index: int, width_in: int, width_out: int, latent_size: int, *, fused: bool) -> None:
        super().__init__()
        self.index = index
        self.conv_1 = ConvUp(width_in, width_out, fused=fused) if index else None
        self.noise_weight_1 = nn.Parameter(torch.zeros(1, width_out, 1, 1))
        self.bias_1 = nn.Parameter(torch.zeros(1, width_out, 1, 1))
        self.style_1 = Linear(latent_size, 2 * width_out, gain=STYLE_GAIN)
        self.conv_2 = Conv3x3(width_out, width_out)
        self.noise_weight_2 = nn.Parameter(torch.zeros(1, width_out, 1, 1))
        self.bias_2 = nn.Parameter(torch.zeros(1, width_out, 1, 1))
        self.style_2 = Linear(latent_size, 2 * width_out, gain=STYLE_GAIN)

    def pixels(self, x: Tensor) -> int:
        """See Block.pixels."""
        return x.shape[-1] * (1 if self.conv_1 is None else 2)

    def forward(self, x: Tensor, style_1: Tensor, style_2: Tensor, noise: NoiseSource) -> Tensor:
        """Twice: convolution, noise, bias, LeakyReLU, instance norm, modulation."""
        if self.conv_1 is not None:
            x = blur(self.conv_1(x))
        x = self._finish(x, noise.map(x, self.index, 1), self.noise_weight_1, self.bias_1, self.style_1(style_1))
        x = self.conv_2(x)
        return self._finish(x, noise.map(x, self.index, 2), self.noise_weight_2, self.bias_2, self.style_2(style_2))

    def _finish(self, x: Tensor, noise: Tensor | None, weight: Tensor, bias: Tensor, style: Tensor) -> Tensor:
        """noise None: the published stand-in for it (see NoiseSource). style: (B, 2 C), scale - 1 and shift."""
        if noise is not None:
            if len(noise) not in (1, len(x)):  # the constant is still one; with maps of their own its samples part here
                x = x.expand(len(noise), -1, -1, -1)
            return adain_act(x, noise, weight.flatten(), bias.flatten(), style, eps=EPS)[0]
        with torch.autocast(x.device.type, enabled=False):
            bumped = bump(wide(x), self.index)
        return adain_act(bumped, None, None, bias.flatten(), style, eps=EPS)[0].to(style.dtype)


def bump(x: Tensor, block: int) -> Tensor:
    """What the public code adds instead of noise: x + 0.8 s exp(-x^2 / (2 s^2)) / sqrt(2 pi), s = sqrt(block + 1)."""
    variance = block + 1
    return x + 0.8 * math.sqrt(variance / (2 * math.pi)) * torch.exp(-x.square() / (2 * variance))


class NoiseSource:
    """The noise maps of one decoder call.

    random: a map for every sample (but the first of block 0, drawn before the constant is repeated for the batch, as
    published); batch_constant: one for the whole global batch; fixed: the same ones always; off: none (zeros);
    published_bump: no map, `bump` instead. Without draws the first two give the fixed maps.
    """

    def __init__(self, kind: Noise, draws: DecoderDraws | None) -> None:
        self.kind: Noise = "fixed" if draws is None and kind in ("random", "batch_constant") else kind
        self.draws = draws

    def map(self, x: Tensor, block: int, layer: int) -> Tensor | None:
        """Noise for x (B, C, H, W): (B or 1, 1, H, W); None stands for the bump."""
        if self.kind == "published_bump":
            return None
        name, size, first = f"block{block}_{layer}", (x.shape[2], x.shape[3]), (block, layer) == (0, 1)
        noise = noise_map(self.kind, size, name, self.draws, like=x, shared=first)
        return torch.zeros(1, 1, 1, 1, dtype=wide(x[:0]).dtype, device=x.device) if noise is None else noise


class StyleDecoder(StyledDecoder):
    """S = 4 * 2^level; two layers a level."""

    def __init__(self, config: StyleSettings) -> None:
        layers, latent = config.layer_count, config.latent_size
        super().__init__(
            Mapping([latent] * (config.mapping_layers + 1)),
            layers=2 * layers,
            latent_size=latent,
            mixing_prob=config.style_mixing_prob,
            average_beta=config.dlatent_avg_beta,
            average_updates=config.dlatent_avg_updates,
            truncation_cutoff=config.truncation_cutoff,
        )
        self.noise: Noise = config.noise
        widths = [min(config.maxf, config.startf * 2 ** (layers - 1 - i)) for i in range(layers)]
        self.const = nn.Parameter(torch.ones(1, min(config.maxf, config.startf * 2 ** (layers - 1)), 4, 4))
        inputs = [widths[0], *widths[:-1]]
        self.blocks = nn.ModuleList(
            DecoderBlock(i, inputs[i], widths[i], latent, fused=config.is_fused(i)) for i in range(layers)
        )
        self.to_rgb = nn.ModuleList(Conv1x1(width, config.channels_in, gain=TO_RGB_GAIN) for width in widths)
        self.level, self.blend = layers - 1, 1.0

    @property
    def layers_in_use(self) -> int:
        """See StyledDecoder."""
        return 2 * (self.level + 1)

    def synthesise(self, styles: Tensor, draws: DecoderDraws | None = None) -> Tensor:
        """styles (B, 2 layer_count, latent_size) -> x_hat (B, C, S, S)."""
        noise = NoiseSource(self.noise, draws)
        h: Tensor = self.const
        before = h
        for i, block in enumerate(self.blocks[: self.level + 1]):
            before, h = h, block(h, styles[:, 2 * i], styles[:, 2 * i + 1], noise)
        x_hat: Tensor = self.to_rgb[self.level](h)
        if self.blend == 1:
            return x_hat
        coarse = self.to_rgb[self.level - 1](before)
        return torch.lerp(functional.interpolate(coarse, scale_factor=2, mode="nearest"), x_hat, self.blend)

    def style_resolutions(self) -> list[int]:
        """See StyledDecoder: two styles a level."""
        return [4 << (i // 2) for i in range(2 * (self.level + 1))]
