"""The residual convolutional autoencoder of IntroVAE and Soft-IntroVAE.

Encoder (n widths):  5x5 convolution, norm, LeakyReLU, /2; n - 1 times a residual block, /2; one more block; linear to
(mu, logvar). Decoder: linear, ReLU, reshape; n times a residual block, x2; one more block; 5x5 convolution.
The bottom map is therefore image_size / 2^n pixels wide. Sources: Huang et al., NeurIPS 2018, appendix B, and the
public code of Daniel & Tamar, CVPR 2021; the two differ in the tail of the residual block (`block`).

Legend: B batch, C channels, H and W pixels of the current map, Z latent dimensions.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from sivae_dist.errors import UserError
from sivae_dist.models.base import Autoencoder, ModelConfig
from sivae_dist.models.blocks import Block as Recomputable
from sivae_dist.models.posterior import Posterior, Prior
from sivae_dist.ops import norm_act
from sivae_dist.ops.norm_act import Resample

Block = Literal["soft_introvae", "introvae"]
Norm = Literal["batch", "group"]
EqualWidthSkip = Literal["identity", "published_introvae"]
Output = Literal["linear", "sigmoid"]

SLOPE = 0.2  # of every LeakyReLU
LARGEST_SHARED_INT = 256  # CPython keeps one object per integer up to here; see ResidualConfig.equal_width_skip
MOST_GROUPS = 32


def make_norm(kind: Norm, width: int) -> nn.Module:
    """Batch norm (eps 1e-5, momentum 0.1), or group norm with the most groups (up to 32) that divide the width."""
    if kind == "batch":
        return nn.BatchNorm2d(width)
    return nn.GroupNorm(next(g for g in range(min(MOST_GROUPS, width), 0, -1) if width % g == 0), width)


class Stem(Recomputable):
    """5x5 convolution, norm, LeakyReLU, /2; (B, C, H, W) -> (B, width, H / 2, W / 2)."""

    def __init__(self, channels_in: int, width: int, norm: Norm) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels_in, width, 5, padding=2, bias=False)
        self.norm = make_norm(norm, width)

    def forward(self, x: Tensor) -> Tensor:
        """The way in."""
        return norm_act(self.conv(x), self.norm, alpha=SLOPE, resample="down")


class ResidualBlock(Recomputable):
    """conv3x3, norm, LeakyReLU, conv3x3, then the tail; (B, width_in, H, W) -> (B, width_out, H, W).

    Tail of `soft_introvae`: LeakyReLU(norm(.) + skip). Tail of `introvae`: LeakyReLU(norm(. + skip)).
    skip: identity, or a 1x1 convolution without norm or bias when `project`.
    resample: x2 (nearest) before everything, or /2 (mean) after everything: part of the block, so that a block which is
    recomputed keeps the smaller map.
    """

    def __init__(
        self, width_in: int, width_out: int, *, block: Block, norm: Norm, project: bool, resample: Resample = "none"
    ) -> None:
        super().__init__()
        self.resample = resample
        self.norm_after_sum = block == "introvae"
        self.skip = nn.Conv2d(width_in, width_out, 1, bias=False) if project else nn.Identity()
        self.conv1 = nn.Conv2d(width_in, width_out, 3, padding=1, bias=False)
        self.norm1 = make_norm(norm, width_out)
        self.conv2 = nn.Conv2d(width_out, width_out, 3, padding=1, bias=False)
        self.norm2 = make_norm(norm, width_out)

    def pixels(self, x: Tensor) -> int:
        """See Block.pixels."""
        return x.shape[-1] * (2 if self.resample == "up" else 1)

    def forward(self, x: Tensor) -> Tensor:
        """One block."""
        if self.resample == "up":
            x = functional.interpolate(x, scale_factor=2, mode="nearest")
        skip = self.skip(x)
        h = self.conv2(norm_act(self.conv1(x), self.norm1, alpha=SLOPE))
        smaller: Resample = "down" if self.resample == "down" else "none"
        return norm_act(h, self.norm2, skip, skip_first=self.norm_after_sum, alpha=SLOPE, resample=smaller)


def join_condition(features: Tensor, condition: Tensor | None, condition_dim: int) -> Tensor:
    """Appends the condition (B, condition_dim) to features (B, F). Raises UserError when it is missing or misfits."""
    if condition_dim == 0 and condition is None:
        return features
    if condition is None or condition.shape != (len(features), condition_dim):
        got = "none" if condition is None else f"shape {tuple(condition.shape)}"
        raise UserError(
            f"the model has condition_dim {condition_dim}, the condition given for {len(features)} samples: {got}",
            f"pass a one-hot tensor of shape ({len(features)}, {condition_dim})"
            if condition_dim
            else "pass no condition, or build the model with condition_dim > 0",
        )
    return torch.cat([features, condition.to(features.dtype)], dim=1)


class ResidualEncoder(nn.Module):
    """x (B, C, H, W) [, condition (B, condition_dim)] -> Posterior over (B, Z)."""

    def __init__(self, config: ResidualConfig) -> None:
        super().__init__()
        widths = config.channels
        self.condition_dim = config.condition_dim
        self.stem = Stem(config.channels_in, widths[0], config.norm)
        pairs = itertools.pairwise(widths)
        self.stages = nn.ModuleList(config.make_block(a, b, between_widths=True, resample="down") for a, b in pairs)
        self.last = config.make_block(widths[-1], widths[-1], between_widths=False)
        self.head = nn.Linear(widths[-1] * config.bottom**2 + config.condition_dim, 2 * config.zdim)

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Posterior:
        """Encodes; the first half of the linear output is mu, the second logvar."""
        h = self.stem(x)
        for stage in self.stages:
            h = stage(h)
        h = join_condition(self.last(h).flatten(1), condition, self.condition_dim)
        mu, logvar = self.head(h).chunk(2, dim=1)
        return Posterior(mu, logvar)


class ResidualDecoder(nn.Module):
    """z (B, Z) [, condition (B, condition_dim)] -> x_hat (B, C, H, W), unbounded unless config.output is "sigmoid"."""

    def __init__(self, config: ResidualConfig) -> None:
        super().__init__()
        widths = config.channels[::-1]
        self.condition_dim = config.condition_dim
        self.bottom_shape = (widths[0], config.bottom, config.bottom)
        self.bounded = config.output == "sigmoid"
        self.head = nn.Linear(config.zdim + config.condition_dim, widths[0] * config.bottom**2)
        first = config.make_block(widths[0], widths[0], between_widths=False)
        pairs = itertools.pairwise(widths)
        stages = (config.make_block(a, b, between_widths=True, resample="up") for a, b in pairs)
        self.stages = nn.ModuleList([first, *stages])
        self.last = config.make_block(widths[-1], widths[-1], between_widths=False, resample="up")
        self.output = nn.Conv2d(widths[-1], config.channels_in, 5, padding=2)

    def forward(self, z: Tensor, condition: Tensor | None = None) -> Tensor:
        """Decodes."""
        h = functional.relu(self.head(join_condition(z, condition, self.condition_dim)))
        h = h.reshape(-1, *self.bottom_shape)
        for stage in self.stages:
            h = stage(h)
        x_hat: Tensor = self.output(self.last(h))
        return torch.sigmoid(x_hat) if self.bounded else x_hat


@dataclass(frozen=True)
class ResidualConfig(ModelConfig):
    """Residual autoencoder for square images. Defaults: the published CIFAR-10 network."""

    name: str = "residual"
    channels_in: int = 3
    """Image channels."""
    image_size: int = 32
    """Pixels a side; must be a multiple of 2^n for n widths (any multiple: 28 with 2 widths gives a 7x7 bottom map,
    32 with 3 a 4x4 one)."""
    channels: tuple[int, ...] = (64, 128, 256)
    """Widths from full resolution down, one for each halving."""
    zdim: int = 128
    """Latent dimensions."""
    block: Block = "soft_introvae"
    """Where the second norm of a residual block sits; see ResidualBlock."""
    norm: Norm = "batch"
    """batch as published, or group: no batch statistics, hence nothing that depends on the batch."""
    equal_width_skip: EqualWidthSkip = "identity"
    """Skip of the blocks between two equal consecutive widths. published_introvae puts a 1x1 convolution there
    when the width exceeds 256: the IntroVAE code compares the integers by object identity, and widths parsed from
    its launch scripts are different objects from 257 up."""
    output: Output = "linear"
    """linear as published; sigmoid for rec_loss bce, which needs probabilities."""
    condition_dim: int = 0
    """Length of the one-hot condition appended to the encoder's features and to z; 0 for none."""
    input_range: tuple[float, float] = (0.0, 1.0)
    """What black and white become; part of the model, so of its checkpoints."""

    @classmethod
    def tiny(cls) -> ResidualConfig:
        """A small instance for tests."""
        return cls(image_size=12, channels=(4, 6), zdim=5)

    @property
    def bottom(self) -> int:
        """Pixels a side of the smallest map."""
        return self.image_size >> len(self.channels)

    def at_resolution(self, size: int) -> ResidualConfig:
        """Halved widths in front of the first, or the first ones dropped: so the published ones of 1024 and 256 pixels
        belong together.
        """
        widths, pixels = self.channels, self.image_size
        while pixels > size and len(widths) > 1:
            widths, pixels = widths[1:], pixels // 2
        while pixels < size:
            widths, pixels = (max(1, widths[0] // 2), *widths), pixels * 2
        if pixels != size:
            raise UserError(
                f"{size} pixels: this network halves {self.image_size} pixels to {self.bottom}",
                f"use {self.bottom} times a power of two",
            )
        return replace(self, image_size=size, channels=widths)

    def make_block(
        self, width_in: int, width_out: int, *, between_widths: bool, resample: Resample = "none"
    ) -> ResidualBlock:
        """A block. between_widths: the widths are consecutive entries of `channels` (see equal_width_skip)."""
        quirk = self.equal_width_skip == "published_introvae" and width_in > LARGEST_SHARED_INT
        project = width_in != width_out or (between_widths and quirk)
        return ResidualBlock(width_in, width_out, block=self.block, norm=self.norm, project=project, resample=resample)

    def check(self) -> None:
        """Raises UserError for values that make no network."""
        if not self.channels or min(self.channels) < 1:
            raise UserError(
                f"model.channels is {self.channels}, expected at least one positive width",
                "give one width for each halving of the image, e.g. (64, 128, 256)",
            )
        for field, least in (("channels_in", 1), ("zdim", 1), ("condition_dim", 0)):
            if getattr(self, field) < least:
                raise UserError(f"model.{field} is {getattr(self, field)}, expected {least} or more", "raise it")
        if not self.input_range[0] < self.input_range[1]:
            raise UserError(f"model.input_range is {self.input_range}, expected (low, high)", "use (0, 1) or (-1, 1)")
        if self.output == "sigmoid" and tuple(self.input_range) != (0.0, 1.0):
            raise UserError(
                f"model.output is sigmoid, whose values lie in [0, 1], but model.input_range is {self.input_range}",
                "use input_range (0, 1), or output linear",
            )
        step = 2 ** len(self.channels)
        if self.image_size < step or self.image_size % step:
            below = self.image_size // step * step
            near = f"{below} or {below + step}" if below else f"{step}"
            raise UserError(
                f"model.image_size is {self.image_size}, but {len(self.channels)} widths halve the image "
                f"{len(self.channels)} times: the size must be a multiple of {step}",
                f"use {near} pixels, or another number of widths in model.channels",
            )

    def build(self) -> Autoencoder:
        """A freshly initialised network: torch's default initialisation, as published.

        Its running statistics are clean; the public constructor feeds zeros in training mode, which leaves the
        encoder's with one update (num_batches_tracked 1, running_var 0.9).
        """
        self.check()
        return Autoencoder(
            ResidualEncoder(self),
            ResidualDecoder(self),
            prior=Prior((self.zdim,)),
            sample_shape=(self.channels_in, self.image_size, self.image_size),
            input_range=self.input_range,
            condition_dim=self.condition_dim,
        )
