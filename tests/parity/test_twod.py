"""The 2-D network and objective against the public implementation."""

from __future__ import annotations

import re

import pytest
import soft
import torch
from golden_files import Golden, comparing, files, of
from runs import load

from sivae_dist.models import Prior
from sivae_dist.models.mlp import MlpConfig
from sivae_dist.objectives import terms

RUNS = [(name, run) for name in of("twod") for run in files()[name].runs()]


@pytest.fixture(params=of("twod"))
def golden(request: pytest.FixtureRequest) -> Golden:
    return files()[request.param]


def test_config_follows_from_shapes(golden: Golden, dtype: torch.dtype) -> None:
    cfg = {name: golden.array(key).tolist() for name, key in golden.under("cfg/").items()}
    built = MlpConfig(
        x_dim=cfg["x_dim"], zdim=cfg["zdim"], width=cfg["num_hidden"], hidden_layers=cfg["n_layers"]
    ).build()
    model = load("twod", golden, dtype).model
    shapes = {name: tensor.shape for name, tensor in built.state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in model.state_dict().items()}
    assert len(golden.tensor("in/x", dtype)) == cfg["batch"]


def test_forward(golden: Golden, dtype: torch.dtype) -> None:
    model = load("twod", golden, dtype).model
    x, eps, z = (golden.tensor(f"in/{name}", dtype) for name in ("x", "eps", "z"))
    with torch.no_grad(), comparing(golden, dtype) as compare:
        q = model.encode(x)
        z_post = terms.reparameterize(q, eps)
        found = {
            "mu": q.mu,
            "logvar": q.logvar,
            "z": z_post,
            "rec": model.decode(z_post),
            "rec_deterministic": model.decode(q.mu),
            "decode": model.decode(z),
        }
        for name, value in found.items():
            compare.both(f"out/{name}", f"out32/{name}", value, "forward")
        for name, key in golden.under("out/kl").items():
            # "/none" against N(0, 1), "_outlier_mu_o_3/none" against N(3, 1)
            other = re.search(r"mu_o_([-\d.]+)/", name)
            rows = terms.kl(q, Prior(model.prior.shape, mu=float(other[1]) if other else 0.0))
            reduction = name.rsplit("/", 1)[1]
            compare.close(key, rows if reduction == "none" else getattr(rows, reduction)())


@pytest.mark.parametrize(("name", "run"), RUNS)
def test_training(name: str, run: str, dtype: torch.dtype) -> None:
    golden = files()[name]
    soft.replay(golden, run, "twod", soft.TWOD, golden.value("cfg/dim_scale"), dtype)
