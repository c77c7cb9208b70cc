"""Interpolation: the formula, and what it does where the formula has no value."""

from __future__ import annotations

import math

import pytest
import torch

from sivae_dist.apps.paths import lerp, slerp, walk


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_slerp_on_the_circle() -> None:
    a, b = torch.tensor([1.0, 0.0]), torch.tensor([math.cos(2.0), math.sin(2.0)])
    for t in (0.0, 0.25, 0.5, 1.0):
        torch.testing.assert_close(slerp(a, b, t), torch.tensor([math.cos(2 * t), math.sin(2 * t)]))


def test_slerp_of_any_lengths() -> None:
    a, b = draw(0, 3, 2), draw(1, 3, 2) * 5
    angle = math.acos(float((a * b).sum() / (a.norm() * b.norm())))
    expected = (math.sin(0.7 * angle) * a + math.sin(0.3 * angle) * b) / math.sin(angle)
    torch.testing.assert_close(slerp(a, b, 0.3), expected)
    assert torch.equal(slerp(a, b, 0), a) and torch.equal(slerp(a, b, 1), b)
    torch.testing.assert_close(slerp(b, a, 0.7), slerp(a, b, 0.3))
    assert slerp(a.float(), b.float(), 0.5).dtype == torch.float32


@pytest.mark.parametrize("tiny", [0.0, 1e-12, 1e-8])
def test_parallel_vectors_are_interpolated_linearly(tiny: float) -> None:
    a = draw(2, 6)
    b = 2 * a + tiny * draw(3, 6)
    torch.testing.assert_close(slerp(a, b, 0.4), lerp(a, b, 0.4))


def test_zero_vectors() -> None:
    zero, b = torch.zeros(4, dtype=torch.float64), draw(4, 4)
    torch.testing.assert_close(slerp(zero, b, 0.25), 0.25 * b)
    torch.testing.assert_close(slerp(b, zero, 0.25), 0.75 * b)
    assert torch.equal(slerp(zero, zero, 0.5), zero)


@pytest.mark.parametrize("tiny", [0.0, 1e-13, 1e-9])
def test_opposite_vectors_go_round_at_even_speed(tiny: float) -> None:
    a = draw(5, 7)
    b = -3 * a + tiny * draw(6, 7)
    points = [slerp(a, b, t) for t in (0, 0.25, 0.5, 0.75, 1)]
    for t, point in zip((0, 0.25, 0.5, 0.75, 1), points, strict=True):
        assert float(point.norm()) == pytest.approx((1 + 2 * t) * float(a.norm()))
        assert float((point @ a) / (point.norm() * a.norm())) == pytest.approx(math.cos(math.pi * t), abs=1e-6)
    torch.testing.assert_close(slerp(a, b, 1e-6), a, atol=1e-4, rtol=0)  # no jump at the ends
    torch.testing.assert_close(slerp(a, b, 1 - 1e-6), b, atol=1e-4, rtol=0)


def test_in_one_dimension_there_is_no_way_round() -> None:
    one = torch.tensor([1.0])
    torch.testing.assert_close(slerp(one, -one, 0.5), torch.zeros(1), atol=1e-7, rtol=0)


def test_nearly_parallel_and_nearly_opposite_stay_finite() -> None:
    a = draw(7, 64)
    for sign in (1, -1):
        for tiny in (1e-3, 1e-5, 3e-6, 1e-6, 3e-7, 1e-7):
            b = sign * a + tiny * draw(8, 64)
            points = torch.stack([slerp(a, b * (a.norm() / b.norm()), t / 10) for t in range(11)])
            lengths = points.norm(dim=1) / a.norm()
            assert lengths.min() > 0.99 and lengths.max() < 1.01


@pytest.mark.parametrize("kind", ["slerp", "lerp"])
def test_a_walk_passes_its_stations(kind) -> None:
    stations = draw(9, 3, 5)
    way = walk(stations, steps=4, loop=False, kind=kind)
    assert len(way) == 9
    for place in range(3):
        assert torch.equal(way[4 * place], stations[place])
    around = walk(stations, steps=4, loop=True, kind=kind)
    assert len(around) == 12 and torch.equal(around[:9], way)
    torch.testing.assert_close(around[10], (slerp if kind == "slerp" else lerp)(stations[2], stations[0], 0.5))
    assert torch.equal(walk(stations[:1], steps=4, loop=True, kind=kind), stations[:1])
    with pytest.raises(ValueError, match="steps is 0"):
        walk(stations, steps=0, loop=False, kind=kind)
