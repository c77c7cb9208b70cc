"""Painted landscapes with known factors: a dataset that needs no download and fits any resolution.

Every picture shows the same kind of place: sky, sun or moon, a cloud, two ranges of hills, a meadow with a house and a
tree. Twelve continuous factors (`FACTORS`) decide how it looks; they are drawn from counters, so scene (seed, number)
has the same factors on every machine, at every resolution and in datasets of any size. Shapes are signed distances in a
unit square, x to the right and y downwards; a pixel's share of a shape is its distance to the edge in pixels, cut off
to [0, 1] (rectangles: the exact overlap). This anti-aliases at all resolutions without supersampling.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image

from sivae_dist import counters
from sivae_dist.data.sources.base import Item
from sivae_dist.errors import UserError

Array: TypeAlias = npt.NDArray[Any]  # float32
Box: TypeAlias = tuple[float, float, float, float]  # left, top, right, bottom
Distance: TypeAlias = Callable[[Array, Array], Array]

# name: (low, high); each factor is uniform in its range and independent of the others. Lengths are in picture widths.
FACTORS: dict[str, tuple[float, float]] = {
    "hour": (0.0, 24.0),  # time of day: colour of sky and light, place of sun or moon, lit windows
    "season": (0.0, 1.0),  # fresh green (0) to autumn orange (1): meadow and tree
    "far_hills": (0.0, 1.0),  # shape of the distant range: phase of its waves
    "near_hills": (0.0, 1.0),  # shape of the nearer range
    "house_x": (0.22, 0.48),  # middle of the house
    "house_size": (0.22, 0.34),  # width of the house
    "house_hue": (0.0, 1.0),  # colour of its walls, once around the colour wheel
    "tree_x": (0.72, 0.90),  # middle of the tree
    "tree_size": (0.26, 0.46),  # height of the tree
    "cloud_x": (0.15, 0.85),  # middle of the cloud
    "cloud_y": (0.12, 0.30),
    "cloud_size": (0.20, 0.36),  # width of the cloud
}

LABELS = ("night", "morning", "midday", "evening")  # item.label: the quarter of the day that `hour` falls in

HOUSE_GROUND = 0.80  # where the walls meet the meadow
WALL_HEIGHT = 0.62  # of the house's width


class _Light(NamedTuple):
    """What the hour decides: colours of the zenith, of the horizon, and of the light that falls on the land."""

    hour: float
    zenith: tuple[float, float, float]
    horizon: tuple[float, float, float]
    light: tuple[float, float, float]


_DAY = (
    _Light(0.0, (0.03, 0.04, 0.16), (0.12, 0.16, 0.38), (0.40, 0.45, 0.68)),
    _Light(4.5, (0.05, 0.06, 0.22), (0.22, 0.20, 0.44), (0.43, 0.46, 0.68)),
    _Light(6.5, (0.38, 0.44, 0.76), (1.00, 0.66, 0.56), (0.92, 0.74, 0.72)),
    _Light(9.0, (0.22, 0.54, 0.92), (0.74, 0.88, 0.98), (1.00, 0.97, 0.90)),
    _Light(12.5, (0.13, 0.48, 0.93), (0.66, 0.88, 1.00), (1.00, 1.00, 1.00)),
    _Light(16.0, (0.22, 0.52, 0.90), (0.88, 0.88, 0.86), (1.00, 0.95, 0.84)),
    _Light(18.0, (0.34, 0.26, 0.58), (1.00, 0.52, 0.22), (0.94, 0.66, 0.54)),
    _Light(20.0, (0.08, 0.08, 0.30), (0.42, 0.22, 0.46), (0.48, 0.44, 0.66)),
    _Light(24.0, (0.03, 0.04, 0.16), (0.12, 0.16, 0.38), (0.40, 0.45, 0.68)),
)
_STARS = (
    (0.07, 0.09),
    (0.21, 0.21),
    (0.33, 0.06),
    (0.46, 0.16),
    (0.58, 0.05),
    (0.69, 0.20),
    (0.80, 0.08),
    (0.93, 0.17),
)


def factors(seed: int, number: int) -> dict[str, float]:
    """The factors of scene `number` under `seed`: uniform in their ranges, rounded to five decimals."""
    values = {}
    for name, (low, high) in FACTORS.items():
        bits = int(counters.hash64(counters.key(seed, "scene", name), np.array([number], dtype=np.uint64))[0])
        values[name] = round(low + (high - low) * (bits >> 11) * 2.0**-53, 5)
    return values


def label(hour: float) -> int:
    """Index into LABELS: night 21-3, morning 3-9, midday 9-15, evening 15-21."""
    return int(((hour + 3.0) % 24.0) // 6.0)


@dataclass
class ScenesSource:
    """`count` scenes, the first `val_count` of them held out (so that a larger dataset keeps the same held-out scenes).

    Raises UserError when the counts make no sense.
    """

    count: int
    seed: int = 0
    val_count: int = 0
    name: str = "scenes"
    license: str = "CC0-1.0"

    def __post_init__(self) -> None:
        if self.count < 1 or not 0 <= self.val_count < self.count:
            raise UserError(
                f"scenes: count is {self.count} and val_count is {self.val_count}; expected 0 <= val_count < count",
                "ask for at least one training scene beyond the held-out ones, e.g. count 4096 and val_count 256",
            )

    def __len__(self) -> int:
        return self.count

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the labels."""
        return LABELS

    def items(self) -> Iterator[Item]:
        """All scenes; `meta` holds the factors, `label` the time of day (LABELS)."""
        for number in range(self.count):
            values = factors(self.seed, number)
            yield Item(
                key=f"scene-{number:06d}",
                split="val" if number < self.val_count else "train",
                label=label(values["hour"]),
                meta=dict(values),
            )

    def open(self, item: Item, resolution: int) -> Image.Image:
        """The scene painted at `resolution`, RGB."""
        return Image.fromarray(render({name: float(str(item.meta[name])) for name in FACTORS}, resolution))


def render(values: Mapping[str, float], resolution: int) -> npt.NDArray[np.uint8]:
    """Paints the scene with the given factors. Returns uint8 (resolution, resolution, 3), sRGB.

    Values outside the ranges of FACTORS are painted too, as far as they make a picture.
    Raises UserError for a resolution below 1.
    """
    if resolution < 1:
        raise UserError(f"scenes: resolution is {resolution}; expected at least 1", "use 32, 64, 128, ... 1024")
    hour = values["hour"] % 24.0
    zenith, horizon, light = _day_colours(hour)
    night = float(np.clip((0.76 - light[0]) / 0.36, 0.0, 1.0))
    canvas = _Canvas(resolution)
    _sky(canvas, hour, zenith, horizon, night)
    _cloud(canvas, values, 0.72 * light + 0.28 * horizon)
    _land(canvas, values, horizon, light)
    _tree(canvas, values, light)
    _house(canvas, values, light, night)
    return canvas.pixels()


class _Canvas:
    """A unit square of colour, resolution x resolution, painted over in layers."""

    def __init__(self, resolution: int) -> None:
        self.resolution = resolution
        self.image: Array = np.zeros((resolution, resolution, 3), dtype=np.float32)
        self.centres: Array = (np.arange(resolution, dtype=np.float32) + np.float32(0.5)) / np.float32(resolution)

    def fill(self, box: Box, distance: Distance, colour: Array, opacity: float = 1.0) -> None:
        """Paints where distance(x, y) < 0. box: the bounds of the shape; only the pixels in it are computed."""
        columns, rows = self._pixels(box[0], box[2]), self._pixels(box[1], box[3])
        x, y = self.centres[None, columns], self.centres[rows, None]
        if x.size and y.size:
            share = np.clip(0.5 - distance(x, y) * self.resolution, 0.0, 1.0) * np.float32(opacity)
            self._blend(rows, columns, share, colour)

    def rectangle(self, box: Box, colour: Array) -> None:
        """Paints a rectangle by the exact share of every pixel, so bars thinner than a pixel keep their weight."""
        columns, rows = self._pixels(box[0], box[2]), self._pixels(box[1], box[3])
        half = 0.5 / self.resolution
        across, down = (
            np.clip(np.minimum(c + half, high) - np.maximum(c - half, low), 0.0, None) * self.resolution
            for c, low, high in ((self.centres[columns], box[0], box[2]), (self.centres[rows], box[1], box[3]))
        )
        self._blend(rows, columns, down[:, None] * across[None, :], colour)

    def _pixels(self, low: float, high: float) -> slice:
        """Rows or columns that an extent may touch, with one to spare for soft edges."""
        return slice(max(0, math.floor(low * self.resolution) - 1), max(0, math.ceil(high * self.resolution) + 1))

    def _blend(self, rows: slice, columns: slice, share: Array, colour: Array) -> None:
        patch = self.image[rows, columns]
        patch += share[..., None] * (colour - patch)

    def pixels(self) -> npt.NDArray[np.uint8]:
        """The picture in bytes, rounded to nearest."""
        scaled: npt.NDArray[np.uint8] = np.floor(np.clip(self.image, 0.0, 1.0) * 255.0 + 0.5).astype(np.uint8)
        return scaled


def _rgb(*channels: float) -> Array:
    return np.array(channels, dtype=np.float32)


def _disc(x0: float, y0: float, radius: float) -> Distance:
    return lambda x, y: np.sqrt((x - x0) ** 2 + (y - y0) ** 2) - radius


def _convex(*corners: tuple[float, float]) -> Distance:
    """Convex polygon, corners clockwise on the screen: the largest of the distances to its edge lines."""
    edges = []
    for (x0, y0), (x1, y1) in zip(corners, corners[1:] + corners[:1], strict=True):
        length = math.hypot(x1 - x0, y1 - y0)
        nx, ny = (y1 - y0) / length, (x0 - x1) / length
        edges.append((nx, ny, nx * x0 + ny * y0))

    return lambda x, y: np.maximum.reduce([nx * x + (ny * y - offset) for nx, ny, offset in edges])


def _bounds(*corners: tuple[float, float]) -> Box:
    across, down = zip(*corners, strict=True)
    return min(across), min(down), max(across), max(down)


def _day_colours(hour: float) -> tuple[Array, Array, Array]:
    """Zenith, horizon and light at an hour in [0, 24): smooth steps between the entries of _DAY."""
    after = next(i for i, stop in enumerate(_DAY) if stop.hour > hour)
    start, stop = _DAY[after - 1], _DAY[after]
    t = (hour - start.hour) / (stop.hour - start.hour)
    t = t * t * (3.0 - 2.0 * t)
    zenith, horizon, light = (_rgb(*a) + t * (_rgb(*b) - _rgb(*a)) for a, b in zip(start[1:], stop[1:], strict=True))
    return zenith, horizon, light


def sky_body(hour: float) -> tuple[str, float, float]:
    """("sun" or "moon", x, y): each rises on the left and sets on the right, the sun from 6 to 18, then the moon."""
    name = "sun" if 6.0 <= hour % 24.0 < 18.0 else "moon"
    t = ((hour - 6.0) % 12.0) / 12.0
    return name, 0.10 + 0.80 * t, 0.68 - 0.54 * math.sin(math.pi * t)


def _sky(canvas: _Canvas, hour: float, zenith: Array, horizon: Array, night: float) -> None:
    height = np.clip(canvas.centres / 0.62, 0.0, 1.0)[:, None, None]
    canvas.image[:] = zenith + height * np.sqrt(height) * (horizon - zenith)
    star = max(0.007, 0.56 / canvas.resolution)  # a star smaller than a pixel is drawn as large as one, but fainter
    for x0, y0 in _STARS if night > 0.0 else ():
        box = (x0 - star, y0 - star, x0 + star, y0 + star)
        canvas.fill(box, _disc(x0, y0, star), _rgb(1.0, 1.0, 0.9), night * (0.007 / star) ** 2)
    body, x0, y0 = sky_body(hour)
    radius = 0.075
    box = (x0 - radius, y0 - radius, x0 + radius, y0 + radius)
    if body == "sun":
        glow = np.exp(-11.0 * ((canvas.centres[None, :] - x0) ** 2 + (canvas.centres[:, None] - y0) ** 2))[..., None]
        canvas.image += 0.42 * glow * (_rgb(1.0, 0.97, 0.84) - canvas.image)
        low = float(np.clip((y0 - 0.25) / 0.35, 0.0, 1.0))
        canvas.fill(box, _disc(x0, y0, radius), _rgb(1.0, 0.93 - 0.33 * low, 0.45 - 0.20 * low))
    else:
        bitten = _disc(x0 + 0.040, y0 - 0.022, 0.062)
        whole = _disc(x0, y0, radius)
        canvas.fill(box, lambda x, y: np.maximum(whole(x, y), -bitten(x, y)), _rgb(0.98, 0.96, 0.84))


def _cloud(canvas: _Canvas, values: Mapping[str, float], colour: Array) -> None:
    x0, y0, size = values["cloud_x"], values["cloud_y"], values["cloud_size"]
    puffs = [_disc(x0 + dx * size, y0 + dy * size, r * size) for dx, dy, r in _PUFFS]

    def distance(x: Array, y: Array) -> Array:
        return np.maximum(np.minimum.reduce([puff(x, y) for puff in puffs]), y - (y0 + 0.16 * size))

    canvas.fill((x0 - 0.5 * size, y0 - 0.35 * size, x0 + 0.5 * size, y0 + 0.16 * size), distance, colour)


_PUFFS = ((-0.32, 0.04, 0.18), (-0.08, -0.08, 0.26), (0.16, -0.02, 0.22), (0.35, 0.07, 0.15), (0.06, 0.06, 0.20))


def _range_of_hills(level: float, height: float, waves: float, phase: float) -> tuple[float, Distance]:
    """Everything below a wavy skyline; the top of its bounding box, and the distance (first order in the slope)."""
    a, b = 2.0 * math.pi * waves, 2.0 * math.pi * phase

    def distance(x: Array, y: Array) -> Array:
        skyline = level - height * (0.68 * np.sin(a * x + b) + 0.32 * np.sin(1.9 * a * x + b + 1.3))
        slope = -height * a * (0.68 * np.cos(a * x + b) + 0.32 * 1.9 * np.cos(1.9 * a * x + b + 1.3))
        return (skyline - y) / np.sqrt(1.0 + slope**2)

    return level - height, distance


def _land(canvas: _Canvas, values: Mapping[str, float], horizon: Array, light: Array) -> None:
    autumn = values["season"]
    meadow = _rgb(0.30, 0.72, 0.22) + autumn * (_rgb(0.86, 0.66, 0.18) - _rgb(0.30, 0.72, 0.22))
    hills = _rgb(0.16, 0.50, 0.34) + autumn * (_rgb(0.58, 0.42, 0.22) - _rgb(0.16, 0.50, 0.34))
    far = 0.55 * _rgb(0.38, 0.46, 0.72) * light + 0.45 * horizon
    top, distance = _range_of_hills(0.55, 0.075, 1.15, values["far_hills"])
    canvas.fill((0.0, top, 1.0, 1.0), distance, far)
    top, distance = _range_of_hills(0.655, 0.045, 0.85, values["near_hills"])
    canvas.fill((0.0, top, 1.0, 1.0), distance, hills * light)
    top, distance = _range_of_hills(0.755, 0.014, 0.50, 0.15)
    canvas.fill((0.0, top, 1.0, 1.0), distance, meadow * light)


def _tree(canvas: _Canvas, values: Mapping[str, float], light: Array) -> None:
    x0, size, autumn = values["tree_x"], values["tree_size"], values["season"]
    ground = 0.86
    trunk = (x0 - 0.055 * size, ground - 0.5 * size, x0 + 0.055 * size, ground)
    canvas.rectangle(trunk, _rgb(0.42, 0.26, 0.14) * light)
    leaves = _rgb(0.10, 0.50, 0.16) + autumn * (_rgb(0.90, 0.36, 0.08) - _rgb(0.10, 0.50, 0.16))
    middle = ground - 0.66 * size
    parts = [_disc(x0 + dx * size, middle + dy * size, r * size) for dx, dy, r in _LEAVES]
    box = (x0 - 0.36 * size, middle - 0.35 * size, x0 + 0.36 * size, middle + 0.32 * size)
    canvas.fill(box, lambda x, y: np.minimum.reduce([part(x, y) for part in parts]), leaves * light)
    bright = (x0 - 0.09 * size, middle - 0.11 * size, 0.14 * size)
    canvas.fill(box, _disc(*bright), np.minimum(leaves * 1.22 + 0.04, 1.0) * light)


_LEAVES = ((0.0, -0.10, 0.24), (-0.15, 0.08, 0.20), (0.15, 0.08, 0.20))


def _house(canvas: _Canvas, values: Mapping[str, float], light: Array, night: float) -> None:
    x0, width = values["house_x"], values["house_size"]
    wall = _rgb(*colorsys.hsv_to_rgb(values["house_hue"] % 1.0, 0.62, 0.96))
    left, right, ground, eaves = x0 - width / 2, x0 + width / 2, HOUSE_GROUND, HOUSE_GROUND - WALL_HEIGHT * width

    path = (
        (x0 - 0.20 * width, ground),
        (x0 + 0.08 * width, ground),
        (x0 + 0.34 * width, 1.0),
        (x0 - 0.40 * width, 1.0),
    )
    canvas.fill(_bounds(*path), _convex(*path), _rgb(0.86, 0.78, 0.60) * light)
    chimney = (x0 + 0.22 * width, eaves - 0.50 * width, x0 + 0.34 * width, eaves - 0.10 * width)
    canvas.rectangle(chimney, _rgb(0.50, 0.28, 0.24) * light)
    canvas.rectangle((left, eaves, right, ground), wall * light)
    roof = ((x0, eaves - 0.52 * width), (right + 0.12 * width, eaves + 0.02), (left - 0.12 * width, eaves + 0.02))
    canvas.fill(_bounds(*roof), _convex(*roof), _rgb(0.58, 0.20, 0.18) * light)

    door = (x0 - 0.17 * width, ground - 0.40 * width, x0 + 0.05 * width, ground)
    canvas.rectangle(door, _rgb(0.36, 0.22, 0.14) * light)
    pane = (x0 + 0.16 * width, ground - 0.45 * width, x0 + 0.40 * width, ground - 0.21 * width)
    glass = (1.0 - night) * _rgb(0.80, 0.93, 1.0) * light + night * _rgb(1.0, 0.84, 0.36)
    edge = 0.025 * width
    frame = (pane[0] - edge, pane[1] - edge, pane[2] + edge, pane[3] + edge)
    canvas.rectangle(frame, _rgb(1.0, 1.0, 1.0) * light)
    canvas.rectangle(pane, glass)
    for bar in (
        (0.5 * (pane[0] + pane[2]) - edge / 2, pane[1], 0.5 * (pane[0] + pane[2]) + edge / 2, pane[3]),
        (pane[0], 0.5 * (pane[1] + pane[3]) - edge / 2, pane[2], 0.5 * (pane[1] + pane[3]) + edge / 2),
    ):
        canvas.rectangle(bar, _rgb(1.0, 1.0, 1.0) * light)
