"""Every recipe in configs/ loads, builds its network, and has the published number of parameters where one is known."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sivae_dist.engine.agreement import check_patience
from sivae_dist.engine.config import RunConfig, from_dict, read_yaml

ROOT = Path(__file__).resolve().parents[2]
RECIPES = {path.stem: path for path in sorted((ROOT / "configs").rglob("*.yaml"))}
# Network of the public code -> its number of parameters.
PUBLISHED = {
    name: layout["n_parameters"]
    for name, layout in json.loads((ROOT / "tests/golden/keys.json").read_text())["models"].items()
}
# Published numbers of networks whose key tables are not kept in the repository, counted on the public code.
COUNTED = {
    "residual_monsters128": 29_437_187,
    "residual_celeb128": 32_583_171,
    "residual_celeb256": 42_024_451,
    "introvae_1024": 49_397_763,
    "style_ffhq256": 53_926_805,
    "style_celebahq256": 53_926_805,
}
# Recipe -> network. None: no network of these sizes was published (the recipe's comment says what is taken instead).
NETWORKS = {
    "celeba128_introvae": None,
    "celeba128_residual": "residual_celeb128",
    "celeba256_residual": "residual_celeb256",
    "celebahq1024_introvae": "introvae_1024",
    "celebahq1024_modulated": None,
    "celebahq1024_residual": "residual_celeb1024",
    "celebahq1024_style": None,
    "celebahq128_residual": "residual_celeb128",
    "celebahq256_introvae": "introvae_256",
    "celebahq256_residual": "residual_celeb256",
    "celebahq256_style": "style_celebahq256",
    "cifar10_residual": "residual_cifar10",
    "fashionmnist_residual": "residual_mnist",
    "ffhq1024_modulated": None,
    "ffhq256_modulated": None,
    "ffhq1024_residual": "residual_celeb1024",
    "ffhq1024_style": None,
    "ffhq256_style": "style_ffhq256",
    "littledata32_style": None,
    "lsunbedroom128_introvae": None,
    "lsunbedroom256_introvae": "introvae_256",
    "mnist_residual": "residual_mnist",
    "modulated32": None,
    "monsters128_residual": "residual_monsters128",
    "quickstart": None,
    "residual32": None,
    "style32": None,
    "svhn_residual": "residual_cifar10",
    **{path.stem: "twod" for path in sorted((ROOT / "configs/toy").glob("*.yaml"))},
}
COMPARED = ("residual32", "style32", "modulated32")  # docs/compare.md
PICTURES = [name for name, network in NETWORKS.items() if network != "twod"]


def load(recipe: str) -> RunConfig:
    return from_dict(read_yaml(RECIPES[recipe]), str(RECIPES[recipe]))


def test_every_recipe_is_accounted_for() -> None:
    assert RECIPES.keys() == NETWORKS.keys()


@pytest.mark.parametrize("recipe", RECIPES)
def test_network(recipe: str) -> None:
    config = load(recipe)
    check_patience(2, config)
    with torch.device("meta"):
        model = config.model.build()
    config.objective.build(model.sample_shape)
    network = NETWORKS[recipe]
    if network is not None:
        unused = 1 if network == "twod" else 0  # the published decoder owns a scalar that it never uses
        assert sum(p.numel() for p in model.parameters()) + unused == {**COUNTED, **PUBLISHED}[network]


@pytest.mark.parametrize("recipe", RECIPES)
def test_says_where_it_comes_from(recipe: str) -> None:
    lines = RECIPES[recipe].read_text().splitlines()
    comment = " ".join(line for line in lines if line.startswith("#"))
    assert "Provenance:" in comment or recipe == "quickstart"


@pytest.mark.parametrize("recipe", [name for name in PICTURES if name not in ("quickstart", *COMPARED)])
def test_trains_on_data_of_its_name_and_size(recipe: str) -> None:
    config, dataset = load(recipe), recipe.rpartition("_")[0]
    assert config.data.url == f"data/{dataset}"  # type: ignore[attr-defined]
    size = config.model.image_size  # type: ignore[attr-defined]
    assert dataset.endswith(str(size)) or (size in (28, 32) and dataset != "celeba")


def test_compared_recipes_differ_in_network_and_optimizer_only() -> None:
    """Their objective is the same in units of [0, 1]: a squared error is four times as large where images span two."""
    reference = load(COMPARED[0])
    assert reference.model.input_range == (0.0, 1.0)  # type: ignore[attr-defined]
    for recipe in COMPARED[1:]:
        config = load(recipe)
        assert config.model.input_range == (-1.0, 1.0)  # type: ignore[attr-defined]
        beta_rec = config.objective.beta_rec * 4  # type: ignore[attr-defined]
        same = replace(config.objective, beta_rec=beta_rec)
        assert replace(config, model=reference.model, optim=reference.optim, objective=same) == reference, recipe


@pytest.mark.parametrize("recipe", ["cifar10_residual", "svhn_residual", "mnist_residual", "fashionmnist_residual"])
def test_digits_are_not_mirrored(recipe: str) -> None:
    assert load(recipe).data.mirror is False  # type: ignore[attr-defined]


@pytest.mark.parametrize("recipe", PICTURES)
def test_only_the_monsters_are_shifted_and_recoloured(recipe: str) -> None:
    """As in the authors' image code."""
    data = load(recipe).data
    changes = (data.mirror, data.shift_px, data.shift_fill, data.hue)  # type: ignore[attr-defined]
    if recipe.startswith("monsters"):
        assert changes == (True, 5, "white", 0.5)
    else:
        assert changes[1] == changes[3] == 0


# Density -> beta_kl, beta_neg of the authors' table; beta_rec is 0.2 for all.
TOY = {"8gaussians": (0.3, 0.9), "2spirals": (0.5, 1.0), "checkerboard": (0.1, 0.2), "rings": (0.2, 1.0)}


@pytest.mark.parametrize("density", TOY)
def test_toy_recipes_are_the_published_ones(density: str) -> None:
    for objective in ("vae", "introvae", "soft_introvae"):
        config = load(f"{density}_{objective}")
        assert (config.objective.name, config.data.density) == (objective, density)  # type: ignore[attr-defined]
        assert config.objective.beta_rec == 0.2  # type: ignore[attr-defined]
        assert config.objective.beta_kl == TOY[density][0]  # type: ignore[attr-defined]
        assert (config.train.batch, config.train.total_nimg, config.train.seed) == (512, 30_000 * 512, 0)
        assert (config.optim.encoder.lr, config.optim.decoder.lr, config.optim.decay) == (2e-4, 2e-4, 0.1)
        assert config.optim.milestones_kimg == (10_000 * 512 / 1000, 15_000 * 512 / 1000)
    soft = load(f"{density}_soft_introvae").objective
    assert (soft.beta_neg, soft.scale, soft.alpha) == (TOY[density][1], 0.5, 2.0)  # type: ignore[attr-defined]
    assert soft.vae_warmup_kimg == 2000 * 512 / 1000  # type: ignore[attr-defined]
