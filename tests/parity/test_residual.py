"""The residual network and the Soft-IntroVAE image objective against the public implementation."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import soft
import torch
from golden_files import Golden, comparing, files, of
from runs import load
from torch import Tensor

from sivae_dist.models import Posterior
from sivae_dist.models.residual import ResidualConfig
from sivae_dist.objectives import Draws, terms
from sivae_dist.objectives.vae import VaeConfig

RUNS = [(name, run) for name in of("residual") for run in files()[name].runs()]


@pytest.fixture(params=of("residual"))
def golden(request: pytest.FixtureRequest) -> Golden:
    return files()[request.param]


def having(prefix: str) -> list[str]:
    """The files with arrays of this prefix."""
    return [name for name in of("residual") if files()[name].under(prefix)]


def test_config_follows_from_shapes(golden: Golden, dtype: torch.dtype) -> None:
    model = load("residual", golden, dtype).model
    cfg = {name: golden.array(key).tolist() for name, key in golden.under("cfg/").items()}
    assert model.sample_shape == (cfg["cdim"], cfg["image_size"], cfg["image_size"])
    assert model.prior.shape == (cfg["zdim"],)
    assert model.condition_dim == (cfg["cond_dim"] if cfg["conditional"] else 0)
    built = ResidualConfig(
        channels_in=cfg["cdim"],
        image_size=cfg["image_size"],
        channels=tuple(cfg["channels"]),
        zdim=cfg["zdim"],
        condition_dim=model.condition_dim,
    ).build()
    shapes = {name: tensor.shape for name, tensor in built.state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in model.state_dict().items()}
    assert len(golden.tensor("in/x", dtype)) == cfg["batch"]


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_forward(golden: Golden, dtype: torch.dtype, mode: str) -> None:
    x, eps, z = (golden.tensor(f"in/{name}", dtype) for name in ("x", "eps", "z"))
    condition = golden.tensor("in/cond", dtype) if "in/cond" in golden else None
    out = f"out/{mode}/"
    with torch.no_grad(), comparing(golden, dtype) as compare:
        net = load("residual", golden, dtype, train=mode == "train")
        q = net.model.encode(x, condition)
        z_post = terms.reparameterize(q, eps)
        found = {"mu": q.mu, "logvar": q.logvar, "z": z_post, "rec": net.model.decode(z_post, condition)}
        state = net.state()
        fresh = load("residual", golden, dtype, train=mode == "train").model
        found["rec_deterministic"] = fresh.decode(q.mu, condition)
        fresh = load("residual", golden, dtype, train=mode == "train").model
        found["decode"] = fresh.decode(z, condition)
        for name, value in found.items():
            compare.both(out + name, f"out32/{mode}/{name}", value, "forward")
        for entry, key in golden.under(f"{out}bn/").items():
            compare.close(key, state[entry], "statistics")


@dataclass
class AnyPrior:
    mu: float | Tensor
    logvar: float | Tensor
    shape: tuple[int, ...] = ()


@pytest.mark.parametrize("name", having("kl/"))
def test_kl(name: str, dtype: torch.dtype) -> None:
    golden = files()[name]
    inputs = golden.group("kl/in/", dtype)
    scalars = {name: golden.value(f"kl/in/{name}_scalar") for name in ("mu_o", "logvar_o")}
    priors = {
        "standard": AnyPrior(0.0, 0.0),
        "mu_o_scalar": AnyPrior(scalars["mu_o"], 0.0),
        "logvar_o_scalar": AnyPrior(0.0, scalars["logvar_o"]),
        "both_scalar": AnyPrior(scalars["mu_o"], scalars["logvar_o"]),
        "both_tensor": AnyPrior(inputs["mu_o"], inputs["logvar_o"]),
    }
    with comparing(golden, dtype) as compare:
        for case in sorted({rest.split("/")[0] for rest in golden.under("kl/out/")}):
            mu, logvar = inputs["mu"].clone().requires_grad_(), inputs["logvar"].clone().requires_grad_()
            rows = terms.kl(Posterior(mu, logvar), priors[case])
            for reduction, value in (("none", rows), ("mean", rows.mean()), ("sum", rows.sum())):
                compare.close(f"kl/out/{case}/{reduction}", value)
            gradients = torch.autograd.grad(rows.mean(), (mu, logvar))
            compare.close(f"kl/grad/{case}/mu", gradients[0])
            compare.close(f"kl/grad/{case}/logvar", gradients[1])


@pytest.mark.parametrize("name", having("recloss/"))
def test_reconstruction(name: str, dtype: torch.dtype) -> None:
    """Published l1 and bce: `none` is elementwise and `mean` goes over all elements. Ours sum per sample."""
    golden = files()[name]
    x, x_hat = golden.tensor("recloss/in/x", dtype), golden.tensor("recloss/in/recon_x", dtype)
    with comparing(golden, dtype) as compare:
        for kind in sorted({rest.split("/")[0] for rest in golden.under("recloss/out/")}):
            leaves = {"x": x.clone().requires_grad_(), "recon_x": x_hat.clone().requires_grad_()}
            rows = terms.reconstruction(leaves["x"], leaves["recon_x"], kind)
            if kind == "mse":
                none, mean = rows, rows.mean()
            else:  # one element a sample gives the elementwise matrix
                none = terms.reconstruction(x.reshape(-1, 1), x_hat.reshape(-1, 1), kind).reshape(len(x), -1)
                mean = rows.mean() / x[0].numel()
            for reduction, value in (("none", none), ("mean", mean), ("sum", rows.sum())):
                compare.close(f"recloss/out/{kind}/{reduction}", value, "loss")
            recorded = golden.under(f"recloss/grad/{kind}/")
            gradients = torch.autograd.grad(mean, [leaves[leaf] for leaf in recorded])
            for key, gradient in zip(recorded.values(), gradients, strict=True):
                compare.close(key, gradient, "loss")


@pytest.mark.parametrize("name", having("vae/"))
def test_conditional_gradient(name: str, dtype: torch.dtype) -> None:
    """A plain VAE step with condition; the reference has no conditional training loop."""
    golden = files()[name]
    net = load("residual", golden, dtype)
    condition = golden.tensor("in/cond", dtype) if "in/cond" in golden else None
    objective = VaeConfig().build(net.model.sample_shape)
    eps = golden.tensor("in/eps", dtype)
    out = objective.joint_loss(
        net.players(condition), golden.tensor("in/x", dtype), Draws({"z_post": eps}.__getitem__), {}
    )
    out.loss.mean().backward()
    with comparing(golden, dtype) as compare:
        compare.close("vae/out/loss_rec", out.named["rec"].mean(), "loss")
        compare.close("vae/out/loss_kl", out.named["kl_real"].mean(), "loss")
        compare.close("vae/out/loss", out.loss.mean(), "loss")
        compare.gradients("vae/grad/", net.gradients())


@pytest.mark.parametrize(("name", "run"), RUNS)
def test_training(name: str, run: str, dtype: torch.dtype) -> None:
    golden = files()[name]
    net = load("residual", golden, dtype)
    scale = golden.value(f"run/{run}/cfg/scale")
    assert scale == pytest.approx(1 / torch.Size(net.model.sample_shape).numel(), rel=1e-12)
    soft.replay(golden, run, "residual", soft.IMAGE, None, dtype)
    golden.value(f"run/{run}/cfg/num_vae")
