"""The encoder: residual blocks with filtered downsampling, nothing that looks at other samples of the batch."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor, nn

from sivae_dist.models.blocks import Block
from sivae_dist.models.modulated.layers import Conv, Fir, make_norm
from sivae_dist.models.modulated.settings import ModulatedSettings
from sivae_dist.models.posterior import Posterior
from sivae_dist.models.style.layers import Linear, lr_multipliers
from sivae_dist.ops import bias_act, downsample2d

HEAD_START = 0.1  # of the head's weights, not of their learning rate: the posterior starts close to N(0, 1)
HALF = math.sqrt(0.5)  # of both summands, so that the sum has the second moment of either


class FromRgb(Block, Conv):
    """The image as features: pointwise convolution, LeakyReLU."""


class EncoderBlock(Block):
    """x (B, width_in, H, W) -> (B, width_out, H / 2, W / 2): the sum of a filtered shortcut and two convolutions.

    The norm stands at the entry of the convolutions, the shortcut goes without: what a norm takes out (contrast, say)
    still reaches the head.
    """

    def __init__(self, config: ModulatedSettings, width_in: int, width_out: int) -> None:
        super().__init__()
        self.fir = Fir(config.resample_filter)
        self.norm = make_norm(config.encoder_norm, width_in)
        self.conv_1 = Conv(width_in, width_in, 3, clamp=config.clamp)
        self.conv_2 = Conv(width_in, width_out, 3, down=2, gain=HALF, clamp=config.clamp)
        self.skip = Conv(width_in, width_out, 1, linear=True, gain=HALF)

    def forward(self, x: Tensor) -> Tensor:
        """One block."""
        skip: Tensor = self.skip(downsample2d(x, self.fir.taps))
        h: Tensor = self.conv_2(self.conv_1(self.norm(x)), self.fir.taps)
        return skip + h


class ModulatedEncoder(nn.Module):
    """x (B, C, S, S) -> Posterior over (B, latent_size)."""

    def __init__(self, config: ModulatedSettings) -> None:
        super().__init__()
        sizes = [4 << i for i in reversed(range(config.layer_count))]
        widths = [config.width(size) for size in sizes]
        self.from_rgb = FromRgb(config.channels_in, widths[0], 1, clamp=config.clamp)
        self.blocks = nn.ModuleList(EncoderBlock(config, a, b) for a, b in itertools.pairwise(widths))
        self.norm = make_norm(config.encoder_norm, widths[-1])
        self.last = Conv(widths[-1], widths[-1], 3, clamp=config.clamp)
        self.hidden = Linear(16 * widths[-1], widths[-1], gain=1.0)
        self.head = Linear(widths[-1], 2 * config.latent_size, gain=1.0)
        # All images have much in common at first, which at full size would be a constant far from the prior's mean.
        with torch.no_grad():
            self.head.weight.mul_(HEAD_START)

    def lr_multipliers(self) -> dict[str, float]:
        """Parameter name -> learning-rate multiplier; parameters that are not named count 1."""
        return lr_multipliers(self)

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Posterior:
        """Encodes; the first half of the linear output is mu, the second logvar. There is no conditional variant."""
        h = self.from_rgb(x)
        for block in self.blocks:
            h = block(h)
        h = self.last(self.norm(h)).flatten(1)
        with torch.autocast(x.device.type, enabled=False):
            h = bias_act(self.hidden(h.to(self.hidden.weight.dtype)))
            mu, logvar = self.head(h).chunk(2, dim=1)
        return Posterior(mu, logvar)
