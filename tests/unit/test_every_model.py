"""Every registered architecture as a whole: trained by the real engine, resumed, saved, loaded.

One that is added needs no code here. tests/unit/test_models.py holds what can be asked of a model by itself, and an
iteration of every objective.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from memory_data import MemoryConfig
from safetensors.torch import load_file

import sivae_dist
from sivae_dist.engine import checkpoint
from sivae_dist.engine.config import RunConfig, from_dict
from sivae_dist.engine.resume import ORIGIN
from sivae_dist.models import ModelConfig
from sivae_dist.registry import components

REGISTERED = components("sivae_dist.models", ModelConfig)
GROWING = [name for name, cls in REGISTERED.items() if cls.tiny().build().levels > 1]
BATCH, LEVEL = 4, 8  # images an iteration, images a level
SETTINGS: dict[str, Any] = {
    "objective": {"beta_neg": 16.0},
    "optim": {"encoder": {"lr": 1e-3}, "decoder": {"lr": 1e-3}},
    "train": {"kimg": 0.016, "batch": BATCH},
    "ema": {"half_life_kimg": 0.01},
    "checkpoint": {"every_kimg": 0.004, "keep_last": 20},
    "tracking": {"every_kimg": 0.004, "images_every_kimg": 0.008, "images": 2, "progress": False, "tensorboard": False},
    "eval": {"every_kimg": 0.008, "images": 6},
}
each = pytest.mark.parametrize("name", REGISTERED)


def settings(name: str, **changes: Any) -> RunConfig:
    model = REGISTERED[name].tiny()
    return replace(from_dict({**SETTINGS, **changes}, "test"), model=model, data=MemoryConfig.of(model.build()))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """A whole run of a model, in some number format; made once."""

    @functools.cache
    def make(name: str, dtype: str = "fp32") -> Path:
        out = tmp_path_factory.mktemp(f"{name}-{dtype}") / "run"
        return sivae_dist.train(settings(name, precision={"dtype": dtype}), out)

    return make


@pytest.fixture(scope="module")
def published_run(run: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The same run as one on shards would leave it: the test's data are registered nowhere, and loading reads them."""

    @functools.cache
    def make(name: str) -> Path:
        saved = last(run(name))
        saved.state["config"]["data"] = {"name": "shards"}
        out = tmp_path_factory.mktemp(name) / "run"
        checkpoint.write(out / "checkpoints", saved)
        return out

    return make


def last(folder: Path) -> checkpoint.Snapshot:
    path = checkpoint.latest(folder / "checkpoints")
    assert path is not None
    return checkpoint.read(path)


def rows(folder: Path, after: int) -> list[dict[str, float]]:
    """Everything reported after so many images, without times and sizes."""
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in row.items() if not k.startswith(("time/", "mem/"))} for row in found if row["nimg"] > after
    ]


def content(path: Path) -> Any:
    """A checkpoint's file: its bytes, or what JSON says without times, and without what a run was resumed from."""
    if path.suffix != ".json":
        return path.read_bytes()
    values = json.loads(path.read_text())
    return {key: value for key, value in values.items() if key not in {"clock", "state.json", ORIGIN}}


def assert_goes_on(config: RunConfig, whole: Path, start: int, out: Path) -> None:
    """From the checkpoint at `start` a run ends as the whole one did, to the last bit."""
    sivae_dist.train(config, out, str(whole / "checkpoints" / checkpoint.name_of(start)))
    assert last(out).nimg == last(whole).nimg > start
    names = sorted(path.name for path in (whole / "checkpoints/").glob(f"{checkpoint.name_of(last(whole).nimg)}/*"))
    assert {"weights.safetensors", "ema.safetensors", "optimizer.safetensors", "state.json"} <= set(names)
    for name in names:
        one, two = (content(r / "checkpoints" / checkpoint.name_of(last(whole).nimg) / name) for r in (whole, out))
        assert one == two, name
    assert rows(out, start) == rows(whole, start) != []


@each
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_resumed_run_ends_alike(name: str, dtype: str, run: Callable[..., Path], tmp_path: Path) -> None:
    assert_goes_on(settings(name, precision={"dtype": dtype}), run(name, dtype), 2 * BATCH, tmp_path / "run")


@pytest.mark.parametrize("name", GROWING)
def test_a_growing_run_resumed_inside_a_fade_ends_alike(name: str, tmp_path: Path) -> None:
    levels = REGISTERED[name].tiny().build().levels
    growth = {"enabled": True, "level_kimg": LEVEL / 1000, "fade_kimg": LEVEL / 1000}
    growth |= {"batch": [BATCH], "lr": [1e-3], "beta_neg": [16]}
    config = settings(name, progressive=growth, train={"kimg": levels * LEVEL / 1000, "batch": BATCH})
    whole = sivae_dist.train(config, tmp_path / "whole")
    assert_goes_on(config, whole, LEVEL + BATCH, tmp_path / "run")


@each
def test_training_went_somewhere(name: str, run: Callable[..., Path]) -> None:
    """What is compared above has moved: both players, the average and the moments of the optimizer."""
    first, end = (checkpoint.read(run(name) / "checkpoints" / checkpoint.name_of(n)) for n in (BATCH, 4 * BATCH))
    for stem, tensors in end.tensors.items():
        players = {key.partition(".")[0].partition("/")[0] for key in tensors}
        assert players == {"encoder", "decoder"}, stem
        for player in players:
            mine = [key for key in tensors if key.startswith(player) and tensors[key].is_floating_point()]
            assert any(not torch.equal(tensors[key], first.tensors[stem][key]) for key in mine), (stem, player)
    assert {"eval/swd", "loss/encoder", "loss/decoder"} <= {tag for row in rows(run(name), 0) for tag in row}


@each
def test_layout_of_the_files(name: str, run: Callable[..., Path]) -> None:
    """docs/checkpoints.md, read with the safetensors library alone."""
    folder = run(name) / "checkpoints" / checkpoint.name_of(4 * BATCH)
    model = REGISTERED[name].tiny().build()
    weights, average, optimizer = (
        load_file(folder / f"{stem}.safetensors") for stem in ("weights", "ema", "optimizer")
    )
    expected = {
        f"{player}.{key}": (value.shape, value.dtype)
        for player in ("encoder", "decoder")
        for key, value in getattr(model, player).state_dict().items()
    }
    for tensors in (weights, average):
        assert {key: (value.shape, value.dtype) for key, value in tensors.items()} == expected
    for player in ("encoder", "decoder"):
        part = {k.removeprefix(f"{player}."): v for k, v in weights.items() if k.startswith(f"{player}.")}
        getattr(model, player).load_state_dict(part, strict=True)
    shapes = {key.replace(".", "/", 1): p.shape for key, p in model.named_parameters()}
    assert {key.rpartition("/")[0] for key in optimizer} <= shapes.keys()  # those of unused levels have none
    for key, value in optimizer.items():
        parameter, _, moment = key.rpartition("/")
        assert value.shape == (torch.Size() if moment == "step" else shapes[parameter])


@each
@pytest.mark.parametrize("average", [True, False])
def test_a_loaded_model_gives_the_same_outputs(
    name: str, average: bool, run: Callable[..., Path], published_run: Callable[[str], Path]
) -> None:
    loaded = sivae_dist.load(published_run(name), average=average)
    assert (loaded.config.model, loaded.nimg) == (REGISTERED[name].tiny(), 4 * BATCH)
    own = REGISTERED[name].tiny().build()
    file = run(name) / "checkpoints" / checkpoint.name_of(4 * BATCH) / ("ema" if average else "weights")
    own.load_state_dict(load_file(file.with_suffix(".safetensors")), strict=True)
    own.eval().requires_grad_(False)
    config = MemoryConfig.of(own)
    batch = config.build(seed=0, salt=0, rank=0, ranks=1).make([0, 1, 2]).to(torch.device("cpu"), own.input_range)
    condition = None
    if own.condition_dim:
        assert batch.label is not None
        condition = torch.nn.functional.one_hot(batch.label, own.condition_dim).float()
    expected, found = own.encode(batch.x, condition), loaded.encode(batch.x, condition)
    assert torch.equal(found.mu, expected.mu) and torch.equal(found.logvar, expected.logvar)
    x_rec = own.decode(expected.mu.contiguous(), condition)  # strides may change the rounding of a product
    x_rec = x_rec.clamp(*own.input_range) if own.input_range else x_rec
    assert torch.equal(loaded.reconstruct(batch.x, condition), x_rec)
    samples = loaded.sample(3, seed=4, condition=condition)
    assert samples.shape == batch.x.shape and samples.isfinite().all()
    assert torch.equal(samples, sivae_dist.load(published_run(name), average=average).sample(3, 4, condition))
