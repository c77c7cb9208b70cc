"""Layers of the style-based networks.

Equalised learning rates (Karras et al., ICLR 2018) live in the optimizer: a weight is stored as it is used, drawn with
standard deviation gain / sqrt(fan in), and its learning rate is multiplied by that number; see `lr_multipliers`.

Legend: B batch, C channels, H and W pixels of the current map.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor, nn
from torch.nn import functional

SLOPE = 0.2  # of every LeakyReLU
GAIN = math.sqrt(2.0)
MAPPING_MULTIPLIER = 0.1  # the mapping networks learn this much slower
FUSED_FROM = 128  # pixels: from here on resampling is part of the convolution


def leaky(x: Tensor) -> Tensor:
    """LeakyReLU."""
    return functional.leaky_relu(x, SLOPE)


class Equalised(nn.Module):
    """A weight (and bias, zero at first) that carries its learning-rate multipliers.

    shape, fan_in: of the weight. outputs: length of the bias, 0 for none. multiplier: of weight and bias alike.
    """

    def __init__(
        self, shape: tuple[int, ...], fan_in: int, outputs: int, *, gain: float = GAIN, multiplier: float = 1.0
    ) -> None:
        super().__init__()
        self.std, self.multiplier = gain / math.sqrt(fan_in), multiplier
        self.weight = nn.Parameter(torch.randn(shape) * self.std)
        self.bias = nn.Parameter(torch.zeros(outputs)) if outputs else None

    def own_multipliers(self) -> dict[str, float]:
        """Parameter name -> learning-rate multiplier."""
        weight = {"weight": self.std * self.multiplier}
        return weight | {"bias": self.multiplier} if self.bias is not None else weight


def lr_multipliers(module: nn.Module) -> dict[str, float]:
    """Parameter name -> learning-rate multiplier of everything equalised in a module; others count 1."""
    return {
        f"{prefix}.{name}": value
        for prefix, layer in module.named_modules()
        if isinstance(layer, Equalised)
        for name, value in layer.own_multipliers().items()
    }


class Linear(Equalised):
    """(B, inputs) -> (B, outputs)."""

    def __init__(self, inputs: int, outputs: int, *, gain: float = GAIN, multiplier: float = 1.0) -> None:
        super().__init__((outputs, inputs), inputs, outputs, gain=gain, multiplier=multiplier)

    def forward(self, x: Tensor) -> Tensor:
        """Affine map."""
        return functional.linear(x, self.weight, self.bias)


class Mapping(nn.Sequential):
    """Linear layers with a LeakyReLU after every one, the last included; widths has one entry more than layers.

    multiplier: of the learning rates, beside the equalising ones.
    """

    def __init__(self, widths: list[int], *, multiplier: float = MAPPING_MULTIPLIER) -> None:
        pairs = itertools.pairwise(widths)
        super().__init__(*(Linear(a, b, multiplier=multiplier) for a, b in pairs))

    def forward(self, input: Tensor) -> Tensor:
        """(B, widths[0]) -> (B, widths[-1])."""
        for layer in self:
            input = leaky(layer(input))
        return input


class Conv1x1(Equalised):
    """Pointwise convolution with bias: fromRGB and toRGB."""

    def __init__(self, inputs: int, outputs: int, *, gain: float = GAIN) -> None:
        super().__init__((outputs, inputs, 1, 1), inputs, outputs, gain=gain)

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) -> (B, outputs, H, W)."""
        return functional.conv2d(x, self.weight, self.bias)


class Conv3x3(Equalised):
    """3x3 convolution, zero padding 1, no bias."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__((outputs, inputs, 3, 3), 9 * inputs, 0)

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) -> (B, outputs, H, W)."""
        return functional.conv2d(x, self.weight, padding=1)


class ConvDown(Conv3x3):
    """3x3 convolution and 2x2 mean; fused: one strided convolution with a 4x4 kernel (equal but for the border)."""

    def __init__(self, inputs: int, outputs: int, *, fused: bool) -> None:
        super().__init__(inputs, outputs)
        self.fused = fused

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) -> (B, outputs, H / 2, W / 2)."""
        if self.fused:
            return functional.conv2d(x, four_shifts(self.weight) / 4, stride=2, padding=1)
        return functional.avg_pool2d(super().forward(x), 2)


class ConvUp(Equalised):
    """Nearest x2 and 3x3 convolution; fused: one transposed convolution with a 4x4 kernel.

    The fused weight is stored (inputs, outputs, 3, 3), as published and as transposed convolutions have it.
    """

    def __init__(self, inputs: int, outputs: int, *, fused: bool) -> None:
        super().__init__((inputs, outputs, 3, 3) if fused else (outputs, inputs, 3, 3), 9 * inputs, 0)
        self.fused = fused

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) -> (B, outputs, 2 H, 2 W)."""
        if self.fused:
            return functional.conv_transpose2d(x, four_shifts(self.weight), stride=2, padding=1)
        return functional.conv2d(functional.interpolate(x, scale_factor=2, mode="nearest"), self.weight, padding=1)


def four_shifts(kernel: Tensor) -> Tensor:
    """The sum of the four one-pixel shifts of a zero-padded kernel: (..., k, k) -> (..., k + 1, k + 1)."""
    padded = functional.pad(kernel, (1, 1, 1, 1))
    return padded[..., 1:, 1:] + padded[..., 1:, :-1] + padded[..., :-1, 1:] + padded[..., :-1, :-1]


def blur(x: Tensor) -> Tensor:
    """Each channel convolved with outer([1, 2, 1], [1, 2, 1]) / 16, zero padding: (B, C, H, W) -> the same shape."""
    taps = torch.tensor([1.0, 2.0, 1.0], dtype=x.dtype, device=x.device) / 4
    channels = x.shape[1]
    return functional.conv2d(x, torch.outer(taps, taps).expand(channels, 1, 3, 3), padding=1, groups=channels)


def unit_second_moment(x: Tensor) -> Tensor:
    """x (B, F) / sqrt(mean of squares over F + 1e-8), (B, F)."""
    return x * torch.rsqrt(x.square().mean(dim=1, keepdim=True) + 1e-8)


def wide(x: Tensor) -> Tensor:
    """At least float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
