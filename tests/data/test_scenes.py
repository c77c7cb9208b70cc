"""Scenes: the same everywhere, at every resolution, and showing what their factors say."""

from __future__ import annotations

import colorsys
import hashlib
import io
import json
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sivae_dist.cli import main
from sivae_dist.cli.scenes import scenes as scenes_command
from sivae_dist.data.manifest import Manifest
from sivae_dist.data.sources.scenes import (
    FACTORS,
    HOUSE_GROUND,
    LABELS,
    WALL_HEIGHT,
    ScenesSource,
    factors,
    label,
    render,
    sky_body,
)
from sivae_dist.errors import UserError

NOON = {name: (low + high) / 2 for name, (low, high) in FACTORS.items()} | {"hour": 12.5, "season": 0.0}
COARSE = [
    155.8,
    182.4,
    173.7,
    151.8,
    175.3,
    176.0,
    190.9,
    183.8,
    135.3,
    148.5,
    148.8,
    142.0,
    151.7,
    152.2,
    138.6,
    134.6,
]


def at(picture: np.ndarray, x: float, y: float) -> np.ndarray:
    """The colour at a place of the unit square, 0..1."""
    size = len(picture)
    return picture[int(y * size), int(x * size)] / 255.0


def hue_of(colour: np.ndarray) -> float:
    return colorsys.rgb_to_hsv(*colour)[0]


def test_factors_are_pinned() -> None:
    # A change here changes every dataset ever packed.
    drawn = json.dumps([factors(0, n) for n in range(64)] + [factors(7, n) for n in range(64)], sort_keys=True)
    assert hashlib.sha256(drawn.encode()).hexdigest()[:16] == "d068cf64adf87edc"


def test_picture_is_pinned() -> None:
    # Mean levels of a coarse raster, with room for the last bit of sin and exp on other machines.
    coarse = render(factors(0, 5), 16).reshape(4, 4, 4, 4, 3).mean(axis=(1, 3, 4)).ravel()
    assert np.abs(coarse - np.array(COARSE)).max() < 0.2


def test_same_numbers_same_picture_other_numbers_other_picture() -> None:
    assert np.array_equal(render(factors(3, 9), 48), render(factors(3, 9), 48))
    assert factors(3, 9) != factors(4, 9)
    assert factors(3, 9) != factors(3, 10)


@pytest.mark.parametrize("number", range(12))
@pytest.mark.parametrize(("small", "mean", "visible"), [(32, 0.75, 0.022), (64, 0.4, 0.008)])
def test_resolutions_agree(number: int, small: int, mean: float, visible: float) -> None:
    # Averaging the large picture must give the small one. Coverage by distance is inexact only at corners, tips and
    # things smaller than a pixel, so few pixels may differ visibly and the mean difference stays below a grey level.
    times = 8
    values = factors(0, number)
    averaged = render(values, small * times).astype(float).reshape(small, times, small, times, 3).mean(axis=(1, 3))
    difference = np.abs(averaged - render(values, small))
    assert difference.mean() < mean
    assert (difference.max(axis=2) > 12).mean() < visible


def test_factors_fill_their_ranges_uniformly_and_independently() -> None:
    drawn = [factors(1, n) for n in range(2000)]
    unit = []
    for name, (low, high) in FACTORS.items():
        values = np.array([d[name] for d in drawn])
        assert low <= values.min() and values.max() <= high
        unit.append((values - low) / (high - low))
        assert np.abs(np.histogram(unit[-1], bins=10, range=(0, 1))[0] - 200).max() < 65  # 4.8 sigma of a binomial
    correlation = np.corrcoef(unit) - np.eye(len(unit))
    assert np.abs(correlation).max() < 0.1  # 4.5 sigma


@pytest.mark.parametrize("hue", [0.0, 1 / 6, 1 / 3, 0.5, 2 / 3, 5 / 6])
def test_house_colour_is_on_the_wall(hue: float) -> None:
    values = NOON | {"house_hue": hue}
    y = HOUSE_GROUND - 0.08 * values["house_size"]
    wall = at(render(values, 256), values["house_x"] + 0.40 * values["house_size"], y)
    assert colorsys.rgb_to_hsv(*wall)[1] > 0.5
    assert abs((hue_of(wall) - hue + 0.5) % 1.0 - 0.5) < 0.02


@pytest.mark.parametrize("x", FACTORS["house_x"])
@pytest.mark.parametrize("size", FACTORS["house_size"])
def test_house_stands_where_its_factors_say(x: float, size: float) -> None:
    picture = render(NOON | {"house_x": x, "house_size": size, "house_hue": 2 / 3}, 512)
    y = HOUSE_GROUND - 0.81 * WALL_HEIGHT * size  # a row of plain wall between the eaves and the window
    across = (np.arange(512) + 0.5) / 512
    blue = np.array([abs(hue_of(c / 255.0) - 2 / 3) < 0.02 for c in picture[int(y * 512)]])
    assert abs(across[blue].mean() - x) < 0.005
    assert abs(blue.mean() - size) < 0.008


@pytest.mark.parametrize("x", FACTORS["tree_x"])
@pytest.mark.parametrize("size", FACTORS["tree_size"])
def test_tree_stands_where_its_factors_say(x: float, size: float) -> None:
    tree = NOON | {"tree_x": x, "tree_size": size}
    green, orange = (at(render(tree | {"season": s}, 256), x + 0.1 * size, 0.86 - 0.66 * size) for s in (0.0, 1.0))
    assert green[1] > 1.5 * green[0] and orange[0] > 1.5 * orange[1]
    trunk = at(render(tree, 256), x, 0.85)
    assert trunk[0] > trunk[1] > trunk[2]


@pytest.mark.parametrize("hour", [8.0, 10.0, 14.0, 16.0, 20.0, 23.0, 1.0, 4.0])
def test_sun_and_moon_follow_the_hour(hour: float) -> None:
    body, x, y = sky_body(hour)
    picture = render(NOON | {"hour": hour, "cloud_x": 3.0, "tree_x": 3.0}, 256)
    place = at(picture, x, y) if body == "sun" else at(picture, x - 0.055, y)  # the lit side of the crescent
    assert body == ("sun" if 6 <= hour < 18 else "moon")
    assert place[:2].min() > 0.6 and place[2] < place[0] - 0.1
    sky = at(picture, 0.5, 0.35).mean()
    assert sky > 0.55 if body == "sun" else sky < 0.45


def test_cloud_is_where_its_factors_say() -> None:
    sky = render(NOON | {"cloud_x": 3.0}, 256).astype(float)
    for x in (0.2, 0.8):
        for y in FACTORS["cloud_y"]:
            changed = np.abs(render(NOON | {"cloud_x": x, "cloud_y": y}, 256) - sky).sum(axis=2) > 20
            rows, columns = np.nonzero(changed)
            assert abs((columns.mean() + 0.5) / 256 - x) < 0.02 and abs((rows.mean() + 0.5) / 256 - y) < 0.03


@pytest.mark.parametrize("name", FACTORS)
def test_every_factor_changes_the_picture(name: str) -> None:
    low, high = FACTORS[name]
    a, b = (render(NOON | {name: low + t * (high - low)}, 64).astype(float) for t in (0.25, 0.75))
    assert (np.abs(a - b).max(axis=2) > 16).mean() > 0.004


@pytest.mark.parametrize("name", ["hour", "house_hue", "far_hills", "near_hills"])
def test_circular_factors_close(name: str) -> None:
    low, high = FACTORS[name]
    a, b = (render(NOON | {name: edge}, 64).astype(int) for edge in (low, high - 1e-5))
    assert np.abs(a - b).max() <= 1


def test_labels() -> None:
    hours = (0, 2.99, 3, 8.99, 9, 12, 14.99, 15, 20.99, 21, 23.99)
    names = ["night"] * 2 + ["morning"] * 2 + ["midday"] * 3 + ["evening"] * 2 + ["night"] * 2
    assert [LABELS[label(hour)] for hour in hours] == names


def test_items_keys_splits_and_meta() -> None:
    source = ScenesSource(count=100, seed=5, val_count=10)
    items = list(source.items())
    assert len(source) == len(items) == len({item.key for item in items}) == 100
    assert items[42].key == "scene-000042" and items[42].meta == factors(5, 42)
    assert [item.split for item in items] == ["val"] * 10 + ["train"] * 90
    assert all(item.label == label(float(str(item.meta["hour"]))) for item in items)
    assert json.loads(json.dumps(items[3].meta)) == items[3].meta
    assert list(ScenesSource(count=150, seed=5, val_count=10).items())[:100] == items
    assert source.license == "CC0-1.0"


def test_open_paints_the_meta_and_survives_pickling() -> None:
    source = pickle.loads(pickle.dumps(ScenesSource(count=4, seed=2, val_count=1)))
    item = list(source.items())[3]
    picture = source.open(item, 40)
    assert picture.mode == "RGB" and picture.size == (40, 40)
    assert np.array_equal(np.asarray(picture), render(factors(2, 3), 40))


@pytest.mark.parametrize(("count", "val"), [(0, 0), (5, 5), (5, -1)])
def test_bad_counts_are_user_errors(count: int, val: int) -> None:
    with pytest.raises(UserError, match="count"):
        ScenesSource(count=count, val_count=val)


def test_bad_resolution_is_a_user_error() -> None:
    with pytest.raises(UserError, match="resolution"):
        render(NOON, 0)


def test_command_packs_scenes_that_read_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "scenes"
    arguments = [
        "data",
        "scenes",
        str(folder),
        "--resolution",
        "16",
        "--count",
        "12",
        "--val-count",
        "4",
        "--seed",
        "3",
    ]
    main([*arguments, "--workers", "1"])
    assert "12 scenes of 16x16 (train 8, val 4)" in capsys.readouterr().out
    manifest = Manifest.from_bytes((folder / "manifest.json").read_bytes(), "manifest.json")
    assert (manifest.license, manifest.class_names, manifest.image_format) == ("CC0-1.0", LABELS, "png")
    seen: dict[str, int] = {}
    for shard in manifest.shards:
        with tarfile.open(folder / f"{shard.name}.tar") as tar:
            members = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
        for name in (n for n in members if n.endswith(".png")):
            key = name.removesuffix(".png")
            number = int(key.removeprefix("scene-"))
            seen[key] = number
            assert shard.split == ("val" if number < 4 else "train")
            picture = np.asarray(Image.open(io.BytesIO(members[name])))
            assert np.array_equal(picture, render(factors(3, number), 16))  # png: not a bit is lost on the way
            facts = json.loads(members[f"{key}.json"])
            assert facts["label"] == label(factors(3, number)["hour"])
            assert factors(3, number).items() <= facts.items()
    assert sorted(seen.values()) == list(range(12))


def test_command_reports_mistakes(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="val_count"):
        scenes_command(tmp_path / "scenes", count=10, val_count=10)
