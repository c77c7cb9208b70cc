"""Shifts, mirroring and hues: pure functions of seed and position, right to the pixel, and nothing at zero."""

from __future__ import annotations

import colorsys

import numpy as np
import pytest
import torch

from sivae_dist.data.augment import Augmentation, Drawn, hue_turned, shifted
from sivae_dist.data.base import HostBatch
from sivae_dist.data.loader import ShardsConfig
from sivae_dist.errors import UserError

CPU = torch.device("cpu")
MONSTERS = {"mirror": True, "shift_px": 5, "hue": 0.5}


def pictures(batch: int, channels: int = 3, height: int = 9, width: int = 7) -> torch.Tensor:
    generator = torch.Generator().manual_seed(batch)
    return torch.randint(0, 256, (batch, channels, height, width), dtype=torch.uint8, generator=generator)


def served(folder, start: int, *, ranks: int = 1, workers: int = 0, size: int = 6, batches: int = 6, **config):
    """{position: picture as the model gets it} over all ranks."""
    found = {}
    for rank in range(ranks):
        options = {"workers": workers, "lanes": 8, "window": 4} | MONSTERS | config
        source = ShardsConfig(url=str(folder), **options).build(seed=5, salt=0, rank=rank, ranks=ranks)
        iterator = source.batches(start, size)
        for _ in range(batches):
            batch = next(iterator).to(CPU, (-1.0, 1.0))
            found |= dict(zip(batch.position.tolist(), batch.x.numpy(), strict=True))
        source.close()
    return found


# ---- what is drawn ---------------------------------------------------------------------------------------------------


def test_a_draw_depends_on_seed_and_position_only() -> None:
    positions = np.array([3, 1_000_000_007, 4, 0, 77])
    whole = Augmentation(9, **MONSTERS).draw(positions)
    for number, position in enumerate(positions):
        one = Augmentation(9, **MONSTERS).draw(np.array([position]))
        for name in ("mirror", "shift", "hue"):
            assert torch.equal(getattr(whole, name)[number : number + 1], getattr(one, name)), name
    other = Augmentation(10, **MONSTERS).draw(positions)
    assert not torch.equal(whole.hue, other.hue) and not torch.equal(whole.shift, other.shift)


def test_no_positions_no_draws() -> None:
    drawn = Augmentation(9, **MONSTERS).draw(np.zeros(0, dtype=np.int64))
    assert drawn.shift.shape == (0, 2) and drawn.hue.shape == drawn.mirror.shape == (0,)
    empty = HostBatch(pictures(3)[:0], torch.zeros(0, dtype=torch.int64), None, drawn)
    assert empty.to(CPU, (0.0, 1.0)).x.shape == (0, 3, 9, 7)


def test_distribution_of_the_draws() -> None:
    """Every shift of -5 ... 5 in both directions, the two ends half as often; hues uniform; all independent."""
    count = 200_000
    drawn = Augmentation(1, **MONSTERS).draw(np.arange(count))
    for axis in (0, 1):
        seen = torch.bincount(drawn.shift[:, axis] + 5, minlength=11) / count
        expected = torch.tensor([0.05] + [0.1] * 9 + [0.05])
        assert len(seen) == 11
        assert (seen - expected).abs().max() < 5 * (0.1 * 0.9 / count) ** 0.5  # five standard deviations
    assert drawn.hue.abs().max() <= 0.5
    assert (torch.histc(drawn.hue, 20, -0.5, 0.5) / count - 0.05).abs().max() < 5 * (0.05 * 0.95 / count) ** 0.5
    columns = torch.stack([drawn.shift[:, 0], drawn.shift[:, 1], drawn.hue, drawn.mirror]).double()
    correlation = torch.corrcoef(columns) - torch.eye(4)
    assert correlation.abs().max() < 5 / count**0.5


def test_zero_settings_change_nothing() -> None:
    drawn = Augmentation(9).draw(np.arange(4))
    assert (drawn.mirror, drawn.shift, drawn.hue) == (None, None, None)
    data, position = pictures(4), torch.arange(4)
    plain, same = HostBatch(data, position), HostBatch(data, position, None, drawn)
    assert torch.equal(plain.to(CPU, (-1.0, 1.0)).x, same.to(CPU, (-1.0, 1.0)).x)


# ---- shifts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fill", "mode"), [("white", "constant"), ("black", "constant"), ("edge", "edge"), ("reflect", "reflect")]
)
@pytest.mark.parametrize("channels", [1, 3])
def test_shifts_are_those_of_padding_and_cutting(fill, mode, channels: int) -> None:
    shifts = [(0, 0), (1, 0), (0, -2), (-3, 4), (5, 6), (-8, -6)]
    data = pictures(len(shifts), channels)
    moved = shifted(data, torch.tensor(shifts), fill)
    assert moved.dtype == torch.uint8
    for picture, (down, right), result in zip(data.numpy(), shifts, moved.numpy(), strict=True):
        more = {"constant_values": 255 if fill == "white" else 0} if mode == "constant" else {}
        padded = np.pad(picture, ((0, 0), (8, 8), (6, 6)), mode=mode, **more)
        np.testing.assert_array_equal(result, padded[:, 8 - down : 17 - down, 6 - right : 13 - right])


def test_the_mirror_comes_after_the_shift() -> None:
    data = pictures(1)
    drawn = Drawn(torch.tensor([True]), torch.tensor([[0, 2]]), "white")
    moved = drawn.move(data)
    assert (moved[..., -2:] == 255).all() and torch.equal(moved[..., :-2], data[..., :-2].flip(-1))


# ---- hues ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("low", [0.0, -1.0])
def test_hues_are_those_of_colorsys(low: float) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (5, 3, 20, 20), generator=generator).double() / 255
    x[0, 1] = x[0, 0]  # ties between the two largest channels, and between the two smallest ones
    x[1, 2] = x[1, 1]
    turns = torch.tensor([-0.5, -0.21, 0.0, 0.125, 0.5], dtype=torch.float64)
    turned = (hue_turned(x * (1 - low) + low, turns) - low) / (1 - low)
    for picture, turn, result in zip(x, turns.tolist(), turned, strict=True):
        for pixel, new in zip(picture.reshape(3, -1).T.tolist(), result.reshape(3, -1).T.tolist(), strict=True):
            h, s, v = colorsys.rgb_to_hsv(*pixel)
            assert new == pytest.approx(colorsys.hsv_to_rgb((h + turn) % 1.0, s, v), abs=1e-12)


@pytest.mark.parametrize("value_range", [(0.0, 1.0), (-1.0, 1.0)])
def test_grey_stays_to_the_last_bit(value_range: tuple[float, float]) -> None:
    grey = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(4, 3, 16, 16)
    drawn = Drawn(hue=torch.tensor([-0.5, -0.1, 0.3, 0.5]))
    batch = HostBatch(grey, torch.arange(4), None, drawn).to(CPU, value_range)
    assert torch.equal(batch.x, HostBatch(grey, torch.arange(4)).to(CPU, value_range).x)


def test_hues_in_float32() -> None:
    x = pictures(6, height=32, width=32).float() / 255
    turns = torch.linspace(-0.5, 0.5, 6)
    single, double = hue_turned(x, turns), hue_turned(x.double(), turns.double())
    assert single.dtype == torch.float32
    assert (single.double() - double).abs().max() < 2e-6  # 1 at most, some roundings, slopes up to 6
    assert single.min() >= 0 and single.max() <= 1


# ---- in the stream ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ranks", "workers"), [(1, 2), (3, 0), (8, 1)])
def test_ranks_and_workers_do_not_change_the_pictures(packed, ranks: int, workers: int) -> None:
    alone, together = served(packed, 0), served(packed, 0, ranks=ranks, workers=workers)
    assert list(alone) == sorted(together) == list(range(36))
    assert all(np.array_equal(alone[p], together[p]) for p in alone)


def test_a_stream_begun_later_goes_on_alike(packed) -> None:
    alone, later = served(packed, 0), served(packed, 17, size=5, batches=3)
    assert all(np.array_equal(alone[p], later[p]) for p in range(17, 32))


def test_another_epoch_makes_other_changes(packed) -> None:
    """Every picture comes once an epoch, and in no two of three epochs alike."""
    plain = served(packed, 0, batches=18, mirror=False, shift_px=0, hue=0.0)
    changed = served(packed, 0, batches=18)
    versions: dict[bytes, set[bytes]] = {}
    for position, picture in plain.items():
        versions.setdefault(picture.tobytes(), set()).add(changed[position].tobytes())
    assert len(versions) == 36
    assert {len(found) for found in versions.values()} == {3}


def test_held_out_pictures_stay_as_they_are(packed) -> None:
    sources = [
        ShardsConfig(url=str(packed), workers=0, lanes=8, **settings).build(seed=5, salt=0, rank=0, ranks=1)
        for settings in (MONSTERS, {"mirror": False})
    ]
    for one, two in zip(*(source.held_out(5, batch=2) for source in sources), strict=True):
        assert one.augment is None and torch.equal(one.data, two.data)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"shift_px": -1}, "data.shift_px is -1"),
        ({"shift_px": 16}, "data.shift_px is 16, but the pictures have 16 pixels"),
        ({"shift_fill": "blue"}, "data.shift_fill is 'blue'"),
        ({"hue": 0.6}, r"data.hue is 0.6, expected 0 to 0.5"),
        ({"hue": -0.1}, r"data.hue is -0.1"),
    ],
)
def test_bad_settings_are_refused(packed, settings, says: str) -> None:
    with pytest.raises(UserError, match=says):
        ShardsConfig(url=str(packed), lanes=8, **settings).build(seed=0, salt=0, rank=0, ranks=1)


def test_grey_pictures_have_no_hue() -> None:
    with pytest.raises(UserError, match="have 1 channel"):
        Augmentation(0, hue=0.5).check(channels=1, resolution=28)
