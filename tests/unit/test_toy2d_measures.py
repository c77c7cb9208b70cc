"""Measures of 2-D models: against plain transcriptions, closed forms, and what a correct measure must satisfy."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from memory_data import MemoryConfig
from torch import Tensor
from torch.nn import functional as F

from sivae_dist.data.toy2d import Toy2dStream
from sivae_dist.distributed.group import Group
from sivae_dist.engine.evaluate import EvalConfig
from sivae_dist.engine.evaluate_points import PointEvaluator, evaluator_for
from sivae_dist.engine.precision import Precision
from sivae_dist.errors import UserError
from sivae_dist.evaluation import plots2d, toy2d
from sivae_dist.models.mlp import MlpConfig


def points(seed: int, n: int = 3000, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(n, 2, generator=torch.Generator().manual_seed(seed))


def numpy_density(x: Tensor, extent: float, bins: int) -> Tensor:
    box = [[-extent, extent], [-extent, extent]]
    return torch.tensor(np.histogram2d(x[:, 0].double(), x[:, 1].double(), bins=bins, density=True, range=box)[0])


@pytest.mark.parametrize(("extent", "bins"), [(2.0, 100), (4.0, 20), (1.5, 7)])
def test_published_measures_are_numpys_histogram_and_torchs_kl_div(extent: float, bins: int) -> None:
    real, fake = points(0), points(1, scale=0.8)
    p, q = numpy_density(real, extent, bins), numpy_density(fake, extent, bins)
    assert torch.allclose(toy2d.density(real, extent, bins), p, rtol=1e-12)
    kl = F.kl_div((q + 1e-14).log(), p, reduction="batchmean")
    m = (p + q) / 2
    parts = [F.kl_div((part + 1e-14).log(), m, reduction="batchmean") for part in (p, q)]
    assert toy2d.published_kl(real, fake, extent, bins) == pytest.approx(float(kl), rel=1e-10)
    assert toy2d.published_jsd(real, fake, extent, bins) == pytest.approx(float(sum(parts)) / 2, rel=1e-10)


def test_points_on_borders_outside_and_nan() -> None:
    x = torch.tensor([[-1.0, -1.0], [1.0, 1.0], [0.0, 0.0], [1.001, 0.0], [math.nan, 0.0], [math.inf, 0.0]])
    assert toy2d.counts(x, 1.0, 2).tolist() == [[1, 0], [0, 2]]
    with pytest.raises(UserError, match="none of 1"):
        toy2d.density(torch.full((1, 2), 9.0), 1.0)


def test_divergences_in_nats_of_known_cells() -> None:
    left, right = torch.tensor([-0.5, -0.5]), torch.tensor([0.5, 0.5])
    real = torch.stack([left] * 3 + [right])
    assert toy2d.histogram_jsd(real, real, 1.0, 2) == pytest.approx(0, abs=1e-12)
    apart = toy2d.histogram_jsd(left.expand(4, 2), right.expand(9, 2), 1.0, 2)
    outside = toy2d.histogram_jsd(left.expand(4, 2), right.expand(9, 2) + 9, 1.0, 2)
    assert apart == pytest.approx(math.log(2))
    assert outside == pytest.approx(math.log(2))  # what leaves the square counts
    # five cells with the outside: P = (3, 1) / 4, Q = (1 + 1/2, 3 + 1/2, 1/2, 1/2, 1/2) / 6.5
    fake = torch.stack([left] + [right] * 3)
    expected = 0.75 * math.log(0.75 / (1.5 / 6.5)) + 0.25 * math.log(0.25 / (3.5 / 6.5))
    assert toy2d.histogram_kl(real, fake, 1.0, 2) == pytest.approx(expected)


def test_divergences_order_models_and_are_symmetric_where_they_should_be() -> None:
    real = points(0)
    near, far = points(1), points(2, scale=0.6)
    for measure in (toy2d.histogram_kl, toy2d.histogram_jsd):
        assert 0 < measure(real, near, 4.0, 40) < measure(real, far, 4.0, 40)
    assert toy2d.histogram_jsd(real, far, 4.0) == pytest.approx(toy2d.histogram_jsd(far, real, 4.0))


def test_grid_nll_of_a_gaussian_is_its_entropy_whatever_its_constant() -> None:
    x = points(0, n=200_000)
    for constant in (0.0, 7.0):
        on_points, on_grid = (
            toy2d.energies(lambda v: v.square().sum(1) / 2, y, torch.float64) + constant
            for y in (x, toy2d.grid(8.0, 128))
        )
        assert toy2d.grid_nll(on_points, on_grid, 8.0) == pytest.approx(math.log(2 * math.pi * math.e), abs=0.02)
    assert toy2d.grid(2.0, 3)[:4].tolist() == [[-2, -2], [-2, 0], [-2, 2], [0, -2]]


def evaluator(stream: Any) -> PointEvaluator:
    config = EvalConfig(images=400, batch=64)
    return PointEvaluator(config, stream, Group(), torch.device("cpu"), Precision(), seed=7)


def test_a_model_of_points_is_judged_by_them() -> None:
    torch.manual_seed(0)
    model = MlpConfig.tiny().build().eval()
    assert evaluator_for(model) is PointEvaluator
    judge = evaluator(Toy2dStream("rings"))
    results = judge.metrics(model)
    assert set(results) == {f"eval/{name}" for name in ("rec", "swd", "hist_kl", "hist_jsd", "grid_nll")}
    assert all(math.isfinite(value) for value in results.values())
    real, fake = judge.points(model)
    assert results["eval/hist_kl"] == toy2d.histogram_kl(real, fake, 4.0)
    on = [judge.energies(model, x) for x in (real, toy2d.grid(4.0, 256))]
    assert results["eval/grid_nll"] == toy2d.grid_nll(on[0], on[1], 4.0)
    with torch.no_grad():
        rec = (real - model.decode(model.encode(real).mu)).square().sum(1).mean()
    assert results["eval/rec"] == pytest.approx(float(rec), rel=1e-5)
    pictures = judge.pictures(model, model, columns=3)
    assert pictures["images/density"].shape == (256, 256, 3)
    assert pictures["grid"].shape == (256, 3 * 256 + 12, 3)
    assert (pictures["images/real"] != pictures["images/prior_ema"]).any()


def test_points_in_other_dimensions() -> None:
    torch.manual_seed(0)
    for dimensions in (1, 5):
        model = MlpConfig(x_dim=dimensions, width=8, hidden_layers=1).build().eval()
        judge = evaluator(MemoryConfig(sample_shape=(dimensions,)).build(seed=0, salt=0, rank=0, ranks=1))
        assert set(judge.metrics(model)) == {"eval/rec", "eval/swd"}
        assert set(judge.pictures(model, model, 3)) == {"images/real", "images/prior", "images/prior_ema", "grid"}


def test_samples_that_are_not_finite_are_told() -> None:
    model = MlpConfig.tiny().build().eval()
    torch.nn.init.constant_(model.decoder.layers.output.bias, math.nan)  # type: ignore[union-attr, arg-type]
    results = evaluator(Toy2dStream("rings")).metrics(model)
    assert math.isnan(results["eval/swd"])
    assert "eval/hist_kl" not in results


def test_pictures_have_the_second_coordinate_upwards() -> None:
    picture = plots2d.scatter(torch.tensor([[0.9, 0.9], [math.nan, 0.0], [5.0, 5.0]]), 1.0, size=20)
    rows, columns = np.nonzero((picture != 255).any(-1))
    assert rows.max() <= 2
    assert columns.min() >= 17
    values = torch.zeros(4, 4)
    values[3, 0] = 1.0  # right, below
    values[0, 0] = math.nan
    picture = plots2d.heat(values, size=8)
    assert picture[7, 7].sum() > picture[0, 0].sum()
    assert tuple(picture[7, 0]) == (255, 0, 255)
