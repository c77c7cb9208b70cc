"""Judging a model of points: divergences of samples from held-out points, likelihood under exp(ELBO), pictures."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from sivae_dist.data import Batch
from sivae_dist.engine.evaluate import Evaluator
from sivae_dist.evaluation import plots2d, toy2d
from sivae_dist.evaluation.sliced_wasserstein import sliced_wasserstein
from sivae_dist.models import Autoencoder

GRID = 256  # points per axis on which exp(ELBO) is normalised
PLANE = 2  # dimensions that have a histogram and a grid


def evaluator_for(model: Autoencoder) -> type[Evaluator]:
    """What judges a model of such samples: pictures or points."""
    return PointEvaluator if len(model.sample_shape) == 1 else Evaluator


class PointEvaluator(Evaluator):
    """As the `Evaluator` of pictures, which it replaces for samples of shape (dimensions,).

    Points have no range. Squares that are looked at have the stream's `extent` as half side, where it tells one, else
    the largest held-out coordinate.
    """

    @torch.no_grad()
    def metrics(self, model: Autoencoder) -> dict[str, float]:
        """eval/rec (|x - decode(mu)|^2), eval/swd; in two dimensions eval/hist_kl, eval/hist_jsd, eval/grid_nll (nats).

        The same on every rank. See `evaluation.toy2d` for definitions.
        """
        parts = [self._judged(model, batch) for batch in self._batches(model)]
        width = 2 * model.sample_shape[0] + 1
        mine = torch.cat(parts) if parts else torch.zeros(0, width, device=self.device)
        every = torch.cat(self.group.gather(mine.contiguous()))
        real, fake, rec = _apart(every)
        results = {"eval/rec": float(rec.double().mean())}
        if not bool(fake.isfinite().all()):
            return results | {"eval/swd": float("nan")}
        results["eval/swd"] = sliced_wasserstein(real, fake, seed=self.seed, size=None)
        if model.sample_shape[0] == PLANE:
            extent = self.extent(real)
            results["eval/hist_kl"] = toy2d.histogram_kl(real, fake, extent)
            results["eval/hist_jsd"] = toy2d.histogram_jsd(real, fake, extent)
            on_points, on_grid = (self.energies(model, x) for x in (real, toy2d.grid(extent, GRID)))
            results["eval/grid_nll"] = toy2d.grid_nll(on_points, on_grid, extent)
        return results

    @torch.no_grad()
    def pictures(self, model: Autoencoder, averaged: Autoencoder, columns: int) -> dict[str, np.ndarray]:
        """Scatters of held-out points and samples by TensorBoard tag, exp(ELBO) on the square; all of them as "grid".

        Of points in more than two dimensions the first two coordinates. columns has no meaning here.
        """
        training = model.training
        model.eval()
        real, fake = self.points(averaged)
        extent = self.extent(real)
        images = {
            "images/real": plots2d.scatter(_plane(real), extent),
            "images/prior": plots2d.scatter(_plane(self.points(model)[1]), extent),
            "images/prior_ema": plots2d.scatter(_plane(fake), extent),
        }
        model.train(training)
        shown = [images["images/real"], images["images/prior_ema"]]
        if averaged.sample_shape[0] == PLANE:
            on_grid = self.energies(averaged, toy2d.grid(extent, GRID)).reshape(GRID, GRID)
            images["images/density"] = plots2d.heat(torch.exp(-on_grid))
            shown.append(images["images/density"])
        return {**images, "grid": plots2d.side_by_side([shown])}

    def points(self, model: Autoencoder) -> tuple[Tensor, Tensor]:
        """This rank's held-out points and as many samples of the model, (N, dimensions) each."""
        parts = [self._judged(model, batch) for batch in self._batches(model)]
        real, fake, _ = _apart(torch.cat(parts))
        return real, fake

    def extent(self, real: Tensor) -> float:
        """Half the side of the square that is looked at."""
        known = getattr(self.stream, "extent", None)
        return float(known) if known is not None else max(float(real.abs().max()), 1e-6)

    def energies(self, model: Autoencoder, x: Tensor) -> Tensor:
        """Negative ELBO with unit weights of points (N, 2): (N,) float64 on the host."""
        energy = toy2d.negative_elbo(self.precision.players(model))
        return toy2d.energies(lambda part: energy(part.to(self.device)), x)

    def _judged(self, model: Autoencoder, batch: Batch) -> Tensor:
        """(B, 2 dimensions + 1): the points, as many samples, squared errors of reconstruction."""
        players = self.precision.players(model, drawing=self._drawing(batch))
        x_rec = players.decoder(players.encoder(batch.x).mu, "rec")
        fake = players.decoder(self._z_prior(model, batch), "prior", from_prior=True)
        return torch.cat([batch.x, fake, (batch.x - x_rec).square().sum(1, keepdim=True)], dim=1).float()


def _apart(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Points, samples, errors out of what `_judged` has put together."""
    dimensions = rows.shape[1] // 2
    return rows[:, :dimensions], rows[:, dimensions:-1], rows[:, -1]


def _plane(x: Tensor) -> Tensor:
    return torch.nn.functional.pad(x, (0, max(0, PLANE - x.shape[1])))[:, :PLANE]
