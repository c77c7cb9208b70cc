"""The toy densities as a stream: points from their numbers alone. Their shapes are compared in tests/parity."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

import sivae_dist
from sivae_dist.data import HostBatch
from sivae_dist.data.toy2d import DENSITIES, EXTENT, Density, Toy2dConfig, Toy2dStream
from sivae_dist.engine import checkpoint
from sivae_dist.engine.config import from_dict
from sivae_dist.errors import UserError

each = pytest.mark.parametrize("density", DENSITIES)


def take(stream: Toy2dStream, start: int, size: int, count: int) -> list[HostBatch]:
    batches = stream.batches(start, size)
    return [next(batches) for _ in range(count)]


@each
def test_a_point_follows_from_its_number(density: Density) -> None:
    whole = torch.cat([b.data for b in take(Toy2dStream(density, seed=3), 0, 100, 3)])
    late = take(Toy2dStream(density, seed=3), 35, 7, 2)
    assert torch.equal(torch.cat([b.position for b in late]), torch.arange(35, 49))
    assert torch.equal(torch.cat([b.data for b in late]), whole[35:49])
    other = [take(Toy2dStream(density, seed=s, salt=t), 0, 300, 1)[0].data for s, t in ((4, 0), (3, 1))]
    assert all((whole != x).all(dim=1).float().mean() > 0.9 for x in other)
    assert whole.dtype == torch.float32
    assert whole.abs().max() <= EXTENT[density]


@each
def test_ranks_share_a_batch(density: Density) -> None:
    whole = take(Toy2dStream(density), 20, 10, 4)
    ranks = [take(Toy2dStream(density, rank=r, ranks=3), 20, 10, 4) for r in range(3)]
    for number, batch in enumerate(whole):
        position = torch.cat([rank[number].position for rank in ranks])
        order = position.argsort()
        assert torch.equal(position[order], batch.position)
        assert torch.equal(torch.cat([rank[number].data for rank in ranks])[order], batch.data)
    held = [torch.cat([b.position for b in Toy2dStream(density, rank=r, ranks=3).held_out(50, 8)]) for r in range(3)]
    assert torch.equal(torch.cat(held).sort().values, torch.arange(50))


def test_batches_may_change_their_size() -> None:
    sizes = iter(Toy2dStream("rings").batches(0, lambda start: 8 if start < 16 else 4))
    got = [next(sizes) for _ in range(4)]
    assert [len(b.position) for b in got] == [8, 8, 4, 4]
    assert torch.equal(torch.cat([b.data for b in got]), take(Toy2dStream("rings"), 0, 24, 1)[0].data)


def test_more_points_than_are_computed_at_once() -> None:
    far = 200_000
    assert torch.equal(take(Toy2dStream("rings"), 0, far, 2)[1].data[:5], take(Toy2dStream("rings"), far, 5, 1)[0].data)


def test_held_out_points_are_others_and_the_same_for_every_seed() -> None:
    one, two = (Toy2dStream("rings", seed=seed).held_out(64)[0].data for seed in (0, 1))
    assert torch.equal(one, two)
    assert not torch.isin(one, take(Toy2dStream("rings", seed=0), 0, 512, 1)[0].data).any()


def test_spirals_come_in_opposite_pairs() -> None:
    x = take(Toy2dStream("2spirals"), 0, 1000, 1)[0].data
    assert (x[::2] + x[1::2]).std() == pytest.approx(0.1 * 2**0.5, rel=0.1)


def test_an_unknown_density_is_told() -> None:
    with pytest.raises(UserError, match="swissroll"):
        Toy2dConfig(density="swissroll").build(seed=0, salt=0, rank=0, ranks=1)  # type: ignore[arg-type]


def test_the_engine_trains_on_it_and_goes_on_exactly(tmp_path: Path) -> None:
    values = {
        "model": {"name": "mlp", "width": 8, "hidden_layers": 1},
        "objective": {"scale": 0.5, "beta_neg": 1.0},
        "data": {"name": "toy2d", "density": "rings"},
        "train": {"kimg": 0.064, "batch": 16},
        "checkpoint": {"every_kimg": 0.032, "keep_last": 9},
        "tracking": {"every_kimg": 0.016, "images_every_kimg": 0.064, "progress": False, "tensorboard": False},
        "eval": {"every_kimg": 0.064, "images": 40, "batch": 16},
    }
    whole = sivae_dist.train(from_dict(values, "test"), tmp_path / "whole")
    assert list((whole / "samples").glob("*.png"))
    start = whole / "checkpoints" / checkpoint.name_of(32)
    again = sivae_dist.train(from_dict(values, "test"), tmp_path / "again", str(start))
    one, two = (checkpoint.read(r / "checkpoints" / checkpoint.name_of(64)) for r in (whole, again))
    for stem, tensors in one.tensors.items():
        assert all(torch.equal(tensor, two.tensors[stem][name]) for name, tensor in tensors.items())
    other = dataclasses.replace(from_dict(values, "test"), data=Toy2dConfig(density="8gaussians"))
    with pytest.raises(UserError, match="data are not those"):
        sivae_dist.train(other, whole)


def test_rings_are_as_wide_as_they_should_be() -> None:
    """What the recorded moments hardly see."""
    radius = take(Toy2dStream("rings"), 0, 40_000, 1)[0].data.double().norm(dim=1)
    outer = radius[radius > (3 + 2.25) / 2] - 3
    assert float(outer.std()) == pytest.approx(0.08, rel=0.03)
    assert len(outer) / 40_000 == pytest.approx(0.25, abs=0.01)
