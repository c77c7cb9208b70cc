"""Judging a model on held-out data: reconstruction, samples, and the grids that people look at."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from sivae_dist import counters
from sivae_dist.data import Batch, HostBatch, Stream
from sivae_dist.distributed.group import Group
from sivae_dist.engine.draws import own_draws
from sivae_dist.engine.iteration import one_hot
from sivae_dist.engine.precision import Drawing, Precision
from sivae_dist.errors import UserError
from sivae_dist.evaluation.grids import grid
from sivae_dist.evaluation.reconstruction import psnr
from sivae_dist.evaluation.sliced_wasserstein import sliced_wasserstein
from sivae_dist.models import Autoencoder, DecoderDraws

SWD_SIZE = 64  # pixels a side at which the sliced Wasserstein distance compares images (larger ones are averaged down)


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation on the held-out split, with averaged weights."""

    every_kimg: float = 100.0
    """Evaluate every this many thousand images, and at the end. 0 evaluates at the end only."""
    at_start: bool = True
    """Also evaluate the untrained model: the baseline that summary.json compares with."""
    images: int = 1024
    """Held-out images used (all, if there are fewer), and as many samples."""
    batch: int = 32
    """Images a rank evaluates at once."""
    noise: Literal["random", "fixed"] = "random"
    """Noise maps of a decoder that adds some: random, other ones for every image, as published figures have them, and
    the same ones in every evaluation; or fixed, the same for all images."""

    def __post_init__(self) -> None:
        if self.every_kimg < 0 or self.images < 2 or self.batch < 1:
            raise UserError(
                f"eval: every_kimg {self.every_kimg}, images {self.images}, batch {self.batch} are not all in range",
                "every_kimg must be at least 0, images at least 2, batch at least 1",
            )


class Evaluator:
    """Holds the held-out images of this rank and computes metrics and grids of any model on them.

    The model is put into evaluation mode and must be (the averaged model always is). Draws, a stochastic decoder's
    too, are keyed by the number of the image, so two evaluations of equal weights agree, on any number of ranks up to
    the order of sums.
    """

    def __init__(
        self, config: EvalConfig, stream: Stream, group: Group, device: torch.device, precision: Precision, seed: int
    ) -> None:
        self.config, self.group, self.device, self.precision, self.seed = config, group, device, precision, seed
        self.stream = stream
        self.host_batches = stream.held_out(config.images, config.batch)
        count = torch.tensor(float(sum(len(b.position) for b in self.host_batches)))
        self.count = int(group.sum_(count.to(group.device())).item())

    @torch.no_grad()
    def metrics(self, model: Autoencoder) -> dict[str, float]:
        """eval/psnr (dB, of decode(mu)), eval/psnr_mean_image (the constant baseline), eval/swd; global over ranks."""
        mean_image = self._mean_image(model)
        scores = torch.zeros(2, dtype=torch.float64, device=self.device)
        reals, fakes = [], []
        for batch in self._batches(model):
            condition = one_hot(batch.label, model.condition_dim, batch.x)
            players = self.precision.players(model, condition, drawing=self._drawing(batch))
            x_rec = players.decoder(players.encoder(batch.x).mu, "rec")
            scores[0] += psnr(batch.x, x_rec, _range(model)).double().sum()
            scores[1] += psnr(batch.x, mean_image.expand_as(batch.x), _range(model)).double().sum()
            reals.append(_small(batch.x))
            fakes.append(
                _small(players.decoder(self._z_prior(model, batch), "prior", from_prior=True).clamp(*_range(model)))
            )
        scores = self.group.sum_(scores) / self.count
        real = torch.cat(self.group.gather(_joined(reals, model, self.device)))
        fake = torch.cat(self.group.gather(_joined(fakes, model, self.device)))
        return {
            "eval/psnr": float(scores[0]),
            "eval/psnr_mean_image": float(scores[1]),
            "eval/swd": sliced_wasserstein(real, fake, input_range=_range(model), seed=self.seed, size=None),
        }

    @torch.no_grad()
    def pictures(self, model: Autoencoder, averaged: Autoencoder, columns: int) -> dict[str, np.ndarray]:
        """Grids by TensorBoard tag, and under "grid" the summary picture real | reconstruction | sample.

        The current model's BN statistics are those of training; both models are judged in evaluation mode.
        """
        batch = self._batch(self.host_batches[0], averaged)
        x = batch.x[:columns]
        condition = one_hot(batch.label, averaged.condition_dim, batch.x)
        condition = condition[:columns] if condition is not None else None
        position = batch.position[:columns]
        training = model.training
        model.eval()
        drawing = self._drawing(Batch(x, position))
        current = self.precision.players(model, condition, drawing=drawing)
        average = self.precision.players(averaged, condition, drawing=drawing)
        posterior = average.encoder(x)
        eps = counters.normal(
            counters.key(self.seed, "grid", "posterior"), position, averaged.prior.shape, posterior.mu.dtype
        )
        z_prior = self._z_prior(averaged, Batch(x, position))
        images = {
            "images/real": x,
            "images/rec_mu": average.decoder(posterior.mu, "rec"),
            "images/rec_sample": average.decoder(posterior.mu + eps * (0.5 * posterior.logvar).exp(), "rec"),
            "images/prior": current.decoder(z_prior, "prior", from_prior=True),
            "images/prior_ema": average.decoder(z_prior, "prior", from_prior=True),
        }
        model.train(training)
        rows = [images["images/real"], images["images/rec_mu"], images["images/prior_ema"]]
        side = math.ceil(math.sqrt(len(x)))  # TensorBoard's cards are narrow: one long line would be a thin strip
        pictures = {tag: grid(torch.split(tensor, side), _range(averaged)) for tag, tensor in images.items()}
        pictures["grid"] = grid(rows, _range(averaged))
        return pictures

    def _batches(self, model: Autoencoder) -> Iterator[Batch]:
        """One batch at a time on the device; the bytes stay on the host."""
        return (self._batch(batch, model) for batch in self.host_batches)

    def _batch(self, host_batch: HostBatch, model: Autoencoder) -> Batch:
        """At the resolution the model works at: that of the data, or a coarser one while it grows."""
        return host_batch.to(self.device, model.input_range, size=model.sample_shape[-1])

    def _mean_image(self, model: Autoencoder) -> Tensor:
        total = torch.zeros(model.sample_shape, dtype=torch.float64, device=self.device)
        for batch in self._batches(model):
            total += batch.x.double().sum(0)
        return (self.group.sum_(total) / self.count).float()

    def _drawing(self, batch: Batch) -> Drawing | None:
        """Noise of a stochastic decoder, every image its own; None leaves it to the decoder's fixed maps."""
        if self.config.noise == "fixed":
            return None

        def draws(name: str, from_prior: bool) -> DecoderDraws:
            return own_draws(self.seed, f"eval {name}", batch.position, batch.x.dtype, from_prior=from_prior)

        return draws

    def _z_prior(self, model: Autoencoder, batch: Batch) -> Tensor:
        key = counters.key(self.seed, "grid", "prior")
        return model.prior.sample(counters.normal(key, batch.position, model.prior.shape, batch.x.dtype))


def _range(model: Autoencoder) -> tuple[float, float]:
    return model.input_range or (0.0, 1.0)


def _small(x: Tensor) -> Tensor:
    """Averaged down before it travels between ranks."""
    return F.adaptive_avg_pool2d(x, SWD_SIZE) if x.shape[-1] > SWD_SIZE else x


def _joined(parts: list[Tensor], model: Autoencoder, device: torch.device) -> Tensor:
    if parts:
        return torch.cat(parts).contiguous()
    channels, height, width = model.sample_shape
    return torch.zeros(0, channels, min(height, SWD_SIZE), min(width, SWD_SIZE), device=device)
