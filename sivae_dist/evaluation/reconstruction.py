"""How well pictures are reproduced, in decibels."""

from __future__ import annotations

import torch
from torch import Tensor

from sivae_dist.errors import UserError


def psnr(x: Tensor, x_hat: Tensor, input_range: tuple[float, float]) -> Tensor:
    """Peak signal-to-noise ratio of each sample, (B,) float64, in dB.

    10 log10((high - low)^2 / mse), mse the mean over a sample's elements of (x - clamp(x_hat, low, high))^2. x_hat is
    clamped because a picture on a screen is; x is not. Equal tensors give +inf, a NaN in either gives NaN for that
    sample. x, x_hat: (B, ...) of one shape. Raises ValueError for different shapes, UserError for an empty range.
    """
    if x.shape != x_hat.shape or x.dim() < 2:
        raise ValueError(f"psnr wants two (B, ...) tensors of one shape, not {tuple(x.shape)} and {tuple(x_hat.shape)}")
    low, high = input_range
    if not low < high:
        raise UserError(
            f"input_range is ({low}, {high}); expected low < high", "give the range of the data, e.g. (0, 1)"
        )
    error = (x.double() - x_hat.double().clamp(low, high)).square().flatten(1).mean(dim=1)
    return 10.0 * torch.log10((high - low) ** 2 / error)


def mean_image_psnr(images: Tensor, input_range: tuple[float, float], mean: Tensor | None = None) -> Tensor:
    """PSNR of one constant picture as everyone's reconstruction, (B,) float64, in dB: what a model must beat.

    images: (B, ...), the pictures to reproduce. mean: (...), the constant, usually the mean of the training pictures;
    None takes the mean of `images` themselves, the constant of least squared error for them.
    """
    constant = images.double().mean(dim=0) if mean is None else mean.double()
    return psnr(images, constant.expand(len(images), *constant.shape), input_range)
