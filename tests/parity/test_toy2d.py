"""Toy densities and 2-D measures against the public implementation.

The compact fixtures hold moments and the grid-normalised ELBO; histograms and the points behind the published KL and
JSD come with SIVAE_GOLDEN.
"""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from golden_files import Golden, files, of
from runs import load

from sivae_dist.data.toy2d import EXTENT, Density, Toy2dStream
from sivae_dist.engine.precision import Precision
from sivae_dist.evaluation import toy2d

NAMES: dict[str, Density] = {
    "8Gaussians": "8gaussians",
    "2spirals": "2spirals",
    "checkerboard": "checkerboard",
    "rings": "rings",
    "25Gaussians": "25gaussians",
}
DRAW = 100_000  # points of one recorded draw
DEVIATIONS = 6  # of the spread between draws, as the fixtures' own text suggests


RECORDED = [(file, name) for file in of("twod") for name in NAMES if files()[file].under(f"toy/{name}/")]
POINTS = [file for file in of("twod") if "metric/in/real" in files()[file]]


def draws(density: Density, count: int) -> list[np.ndarray]:
    batches = Toy2dStream(density, seed=5).batches(0, DRAW)
    return [next(batches).data.numpy() for _ in range(count)]


@pytest.mark.parametrize(("file", "name"), RECORDED)
def test_density(file: str, name: str) -> None:
    golden = files()[file]
    recorded = golden.under(f"toy/{name}/")
    mine = draws(NAMES[name], 2)
    for x in mine:
        assert np.abs(x).max() <= EXTENT[NAMES[name]]
        for moment, value in (("mean", x.mean(0)), ("cov", np.cov(x.T))):
            if f"{moment}_draws" in recorded:
                every = golden.array(recorded[f"{moment}_draws"])
                spread, centre = every.std(0, ddof=1), every.mean(0)
                assert np.allclose(golden.array(recorded[moment]), every[0])
            else:  # one fixed draw: of the size of its sampling error
                centre, spread = golden.array(recorded[moment]), np.array(4 / DRAW**0.5)
            assert (np.abs(value - centre) <= DEVIATIONS * spread).all(), (moment, value, centre, spread)
    check_shape(golden, recorded, mine)


def check_shape(golden: Golden, recorded: dict[str, str], mine: list[np.ndarray]) -> None:
    """Largest coordinates, quantiles of the radius, histograms: what of them was recorded."""
    x = mine[0]
    if "absmax_draws" in recorded:
        every = golden.array(recorded["absmax_draws"])
        spread = np.maximum(every.std(0, ddof=1), 1e-3)
        assert (np.abs(np.abs(x).max(0) - every.mean(0)) <= DEVIATIONS * spread).all()
    if "radius_quantiles" in recorded:
        radius = [np.linalg.norm(draw, axis=1) for draw in mine]
        inner = np.arange(5, 100, 5)  # the least and the largest of a draw vary as they please
        levels = golden.array(recorded["radius_quantiles"])[1:-1]
        for r in radius:  # compare in probability: quantiles are ill determined where there are few points
            share = np.searchsorted(np.sort(r), levels) / DRAW
            assert np.abs(share - inner / 100).max() <= DEVIATIONS * 0.5 * (2 / DRAW) ** 0.5
    if "hist_100k" not in recorded:
        return
    edges = golden.array(recorded["edges"])
    histograms = [np.histogram2d(draw[:, 0], draw[:, 1], bins=[edges, edges])[0] for draw in mine]
    one = golden.array(recorded["hist_100k"])
    if "tv_between_draws" in recorded:
        allowed = 1.25 * golden.array(recorded["tv_between_draws"]).max()
    else:  # two draws of N points over k cells of probabilities p differ by about sum sqrt(p / (pi N))
        allowed = 1.25 * np.sqrt(one / one.sum() / (np.pi * DRAW)).sum()
    for histogram in histograms:
        assert np.abs(histogram / histogram.sum() - one / one.sum()).sum() / 2 <= allowed
    if "hist_800k" in recorded:
        pooled = golden.array(recorded["hist_800k"])
        assert golden.value(recorded["outside_800k"]) == 0 == sum(DRAW - int(h.sum()) for h in histograms)
        assert np.abs(histograms[0] / DRAW - pooled / pooled.sum()).sum() / 2 <= allowed


@pytest.mark.parametrize("file", POINTS)
def test_published_divergences(file: str) -> None:
    golden = files()[file]
    real, fake = (golden.tensor(f"metric/in/{kind}", torch.float32) for kind in ("real", "fake"))
    measures = {"kl": toy2d.published_kl, "jsd": toy2d.published_jsd}
    for kind, measure in measures.items():
        for name, key in golden.under(f"metric/out/{kind}/").items():
            bins, extent = map(int, re.fullmatch(r"bins(\d+)_range(\d+)", name).groups())  # type: ignore[union-attr]
            assert measure(real, fake, extent, bins) == pytest.approx(golden.value(key), rel=1e-9)
    for name, key in golden.under("metric/out/real_density_hist_").items():
        bins, extent = map(int, re.fullmatch(r"bins(\d+)_range(\d+)", name).groups())  # type: ignore[union-attr]
        assert np.allclose(toy2d.density(real, extent, bins).numpy(), golden.array(key), rtol=1e-12)


@pytest.mark.parametrize("file", of("twod"))
def test_grid_normalised_elbo(file: str) -> None:
    golden = files()[file]
    model = load("twod", golden, torch.float64).model
    players = Precision().players(model)
    points = golden.tensor("metric/in/elbo_eval_batches", torch.float64).flatten(0, 1)
    for name, key in golden.under("metric/out/gnelbo_").items():
        weights, extent, n = re.fullmatch(r"(.*?)_?lim(\d+)_n(\d+)", name).groups()  # type: ignore[union-attr]
        betas = re.fullmatch(r"bkl([\d.]+)_brec([\d.]+)", weights)
        beta_kl, beta_rec = map(float, betas.groups()) if betas else (1.0, 1.0)
        energy = toy2d.negative_elbo(players, beta_rec=beta_rec, beta_kl=beta_kl)
        grid = toy2d.grid(float(extent), int(n))
        on_grid, on_points = (toy2d.energies(energy, x, torch.float64, batch=100) for x in (grid, points))
        assert toy2d.gnelbo(on_points, on_grid) == pytest.approx(golden.value(key), rel=1e-9)
        if betas is None:
            for kind, found in (("grid", grid), ("density", torch.exp(-on_grid).reshape(int(n), int(n)))):
                if f"metric/out/{kind}_lim{extent}_n{n}" in golden:
                    recorded = golden.array(f"metric/out/{kind}_lim{extent}_n{n}")
                    assert np.allclose(found.numpy(), recorded, rtol=1e-9, atol=1e-12)
