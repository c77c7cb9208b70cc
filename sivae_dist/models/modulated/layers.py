"""Layers of the modulated networks.

Magnitudes: weights are drawn with standard deviation gain / sqrt(fan in) and gain 1; LeakyReLU is followed by sqrt(2).
So a layer whose inputs are independent with second moment one has outputs with second moment about one. Equalised
learning rates are the optimizer's affair, as in `models.style.layers`: a weight is stored as it is used and its rate is
multiplied by that deviation, which for Adam is the same as multiplying the weight whenever it is used.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from sivae_dist.models.style.layers import Equalised, Linear, wide
from sivae_dist.ops import bias_act, conv2d_resample, modulated_conv2d, modulated_layer, setup_filter

Norm = Literal["none", "group", "pixel"]
NORM_EPS = 1e-3  # for inputs of about unit size; much less would make a grey image's gradient huge
MOST_GROUPS = 32


class Fir(nn.Module):
    """The resampling filter: normalised, float32, not part of the state dict."""

    taps: Tensor

    def __init__(self, taps: tuple[float, ...]) -> None:
        super().__init__()
        self.register_buffer("taps", setup_filter(taps), persistent=False)


class Affine(Linear):
    """w (B, latent_size) -> styles (B, outputs), about one at first: the bias starts there.

    spread: standard deviation of the styles at first. Learning rates are those of deviation one.
    """

    def __init__(self, latent_size: int, outputs: int, *, spread: float) -> None:
        super().__init__(latent_size, outputs, gain=1.0)
        nn.init.ones_(self.bias)  # type: ignore[arg-type]
        with torch.no_grad():
            self.weight.mul_(spread)

    def forward(self, x: Tensor) -> Tensor:
        """In full precision: a style scales a whole map."""
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.to(self.weight.dtype))


class StyledConv(Equalised):
    """3x3 convolution modulated by a style and demodulated, noise, bias, LeakyReLU; or the same after x2."""

    def __init__(
        self, width_in: int, width_out: int, latent_size: int, *, up: int, spread: float, clamp: float | None
    ) -> None:
        super().__init__((width_out, width_in, 3, 3), 9 * width_in, width_out, gain=1.0)
        self.affine = Affine(latent_size, width_in, spread=spread)
        self.noise_strength = nn.Parameter(torch.zeros(()))
        self.up, self.clamp = up, clamp

    def forward(
        self,
        x: Tensor,
        styles: Tensor,
        noise: Tensor | None,
        fir: Tensor,
        *,
        scaled: bool = False,
        next_styles: Tensor | None = None,
    ) -> Tensor:
        """x (B, width_in, H, W), styles (B, width_in) of `affine`, noise (B or 1, 1, up H, up W).

        Returns (B, width_out, up H, up W); with next_styles (B, width_out), the map scaled by them, which the layer
        with these styles takes with `scaled`.
        """
        y, following = modulated_layer(
            x,
            self.weight,
            styles,
            self.bias,
            noise,
            None if noise is None else self.noise_strength,
            up=self.up,
            padding=1,
            resample_filter=fir if self.up > 1 else None,
            clamp=self.clamp,
            scaled=scaled,
            next_styles=next_styles,
            plain=next_styles is None,
        )
        result = y if next_styles is None else following
        assert result is not None
        return result


class ToRgb(Equalised):
    """Pointwise convolution modulated by a style, not demodulated, and bias: (B, width, H, W) -> (B, C, H, W)."""

    def __init__(self, width: int, channels: int, latent_size: int, *, spread: float, gain: float) -> None:
        super().__init__((channels, width, 1, 1), width, channels, gain=gain)
        self.affine = Affine(latent_size, width, spread=spread)

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        """float32 at least, so that the sum over levels is."""
        y = modulated_conv2d(x, self.weight, self.affine(style), demodulate=False)
        return bias_act(wide(y), self.bias, act="linear")


class Conv(Equalised):
    """Convolution of odd size that keeps the size, or halves it with the filter before; LeakyReLU unless linear.

    gain: of the output, beside the activation's own. linear: neither bias nor activation.
    """

    def __init__(
        self,
        width_in: int,
        width_out: int,
        size: int,
        *,
        down: int = 1,
        linear: bool = False,
        gain: float = 1.0,
        clamp: float | None = None,
    ) -> None:
        super().__init__(
            (width_out, width_in, size, size), size * size * width_in, 0 if linear else width_out, gain=1.0
        )
        self.down, self.linear, self.gain = down, linear, gain
        self.clamp = None if clamp is None else clamp * gain

    def forward(self, x: Tensor, fir: Tensor | None = None) -> Tensor:
        """(B, width_in, H, W) -> (B, width_out, H / down, W / down)."""
        padding = self.weight.shape[-1] // 2
        y = conv2d_resample(x, self.weight * self.gain if self.linear else self.weight, fir, 1, self.down, padding)
        return y if self.linear else bias_act(y, self.bias, gain=math.sqrt(2.0) * self.gain, clamp=self.clamp)


class PixelNorm(nn.Module):
    """Every pixel's features divided by the root of their mean square: (B, C, H, W) -> the same shape."""

    def forward(self, x: Tensor) -> Tensor:
        """In float32, as group norm under autocast."""
        with torch.autocast(x.device.type, enabled=False):
            h = wide(x)
            return (h * torch.rsqrt(h.square().mean(dim=1, keepdim=True) + NORM_EPS)).to(x.dtype)


class GroupNorm(nn.Module):
    """Group norm without weights, with the most groups (up to 32) that divide the width and leave two channels each.

    One channel alone would lose how strong it is at all against the others.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.groups = next(g for g in range(min(MOST_GROUPS, max(1, width // 2)), 0, -1) if width % g == 0)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> the same shape."""
        return functional.group_norm(x, self.groups, eps=NORM_EPS)


def make_norm(kind: Norm, width: int) -> nn.Module:
    """A norm that looks at one sample alone, or none."""
    if kind == "none":
        return nn.Identity()
    return PixelNorm() if kind == "pixel" else GroupNorm(width)
