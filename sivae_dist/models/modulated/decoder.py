"""The decoder: modulated convolutions, an image that is the sum of what every level adds (Karras et al., CVPR 2020)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from sivae_dist.models.base import DecoderDraws
from sivae_dist.models.blocks import Block
from sivae_dist.models.modulated.layers import Fir, StyledConv, ToRgb
from sivae_dist.models.modulated.settings import ModulatedSettings
from sivae_dist.models.style.layers import Mapping, wide
from sivae_dist.models.style.styled import MapNoise, StyledDecoder, noise_map
from sivae_dist.ops import setup_filter, upsample2d


class DecoderBlock(Block):
    """A level: features (B, width_in, H, W) -> (B, width_out, 2 H, 2 W) and the image so far; the first keeps the size.

    Layers: convolution with x2 (not in the first), convolution, toRGB, which has the style of the layer after it.
    """

    def __init__(self, config: ModulatedSettings, index: int) -> None:
        super().__init__()
        self.index, self.noise = index, config.noise
        width, latent, spread = config.width(4 << index), config.latent_size, config.style_spread
        self.fir = Fir(config.resample_filter)
        before = config.width(2 << index)
        self.conv_up = StyledConv(before, width, latent, up=2, spread=spread, clamp=config.clamp) if index else None
        self.conv = StyledConv(width, width, latent, up=1, spread=spread, clamp=config.clamp)
        # All levels add up, and styles have second moment two at most at first: an image of order one.
        gain = 1 / math.sqrt(2 * config.layer_count)
        self.to_rgb = ToRgb(width, config.channels_in, latent, spread=spread, gain=gain)

    def pixels(self, x: Tensor) -> int:
        """See Block.pixels."""
        return x.shape[-1] * (1 if self.conv_up is None else 2)

    def forward(
        self, x: Tensor, rgb: Tensor | None, styles: Tensor, draws: DecoderDraws | None
    ) -> tuple[Tensor, Tensor]:
        """rgb: the image so far (B, C, H, W), None for the first. styles: (B, 3, latent_size), the first alone unused
        where there is no convolution with x2.
        """
        taps = self.fir.taps
        own = self.conv.affine(styles[:, 1])
        if self.conv_up is not None:
            first = self.conv_up.affine(styles[:, 0])
            x = self.conv_up(x, first, self._noise(x, 2, 1, draws), taps, next_styles=own)
        x = self.conv(x, own, self._noise(x, 1, 2, draws), taps, scaled=self.conv_up is not None)
        more: Tensor = self.to_rgb(x, styles[:, 2])
        return x, more if rgb is None else upsample2d(rgb, taps) + more

    def _noise(self, x: Tensor, up: int, layer: int, draws: DecoderDraws | None) -> Tensor | None:
        size = (x.shape[2] * up, x.shape[3] * up)
        return noise_map(self.noise, size, f"block{self.index}_{layer}", draws, like=x)


class ModulatedDecoder(StyledDecoder):
    """S = image_size. Layers: a convolution at 4 pixels, two at every finer level, and the last toRGB."""

    def __init__(self, config: ModulatedSettings) -> None:
        latent = config.latent_size
        super().__init__(
            Mapping([latent] * (config.mapping_layers + 1), multiplier=config.mapping_multiplier),
            layers=2 * config.layer_count,
            latent_size=latent,
            mixing_prob=config.style_mixing_prob,
            average_beta=config.dlatent_avg_beta,
            average_updates="training",
            truncation_cutoff=config.truncation_cutoff,
        )
        self.noise: MapNoise = config.noise
        # Resampling leaves 4 sum(f^2) of the power of a map without correlations: the constant is one, no later map is.
        left = 4 * setup_filter(config.resample_filter, separable=False).square().sum()
        self.const = nn.Parameter(torch.randn(1, config.width(4), 4, 4) * torch.rsqrt(left))
        self.blocks = nn.ModuleList(DecoderBlock(config, i) for i in range(config.layer_count))

    def map(self, z: Tensor) -> Tensor:
        """In full precision, see StyledDecoder."""
        with torch.autocast(z.device.type, enabled=False):
            return super().map(z.to(self.const.dtype))

    def style_resolutions(self) -> list[int]:
        """See StyledDecoder."""
        last = len(self.blocks) - 1
        return [4 << min((layer + 1) // 2, last) for layer in range(self.layers_in_use)]

    def synthesise(self, styles: Tensor, draws: DecoderDraws | None = None) -> Tensor:
        """styles (B, 2 layer_count, latent_size) -> x_hat (B, C, S, S)."""
        x = self.const.expand(len(styles), -1, -1, -1)
        rgb: Tensor | None = None
        for i, block in enumerate(self.blocks):
            first = max(2 * i - 1, 0)  # the first block has no convolution with x2; its own style stands in
            own = styles[:, first : first + 3] if i else styles[:, [0, 0, 1]]
            x, rgb = block(x, rgb, own, draws)
        assert rgb is not None
        return wide(rgb)
