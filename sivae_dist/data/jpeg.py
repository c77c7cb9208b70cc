"""JPEG by libjpeg-turbo's own interface (package simplejpeg), straight into the memory of a batch.

Pillow uses the same library, but hands pixels over through copies. Both decode to the same bytes: `usable` decodes
probe pictures with both and finds out, so that what a run sees does not depend on what is installed. Whatever this way
does not take (other colour spaces, sizes that differ, damage of any kind) is left to Pillow, whose word counts.
"""

from __future__ import annotations

import functools
import io
from types import ModuleType
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from sivae_dist.counters import hash64, key
from sivae_dist.data.decode import open_image
from sivae_dist.errors import UserError

DecoderName = Literal["auto", "pillow", "simplejpeg"]

REDUCTIONS = (1, 2, 4, 8)  # times that pictures may be decoded smaller a side

Pixels = npt.NDArray[np.uint8]

_SPACES = {3: ("RGB", "YCbCr"), 1: ("GRAY", "Gray")}  # channels: what to decode to, what the file must hold for it


def choose(name: str, image_format: str) -> Literal["pillow", "simplejpeg"]:
    """The decoder that data.decoder means for pictures of this format. Raises UserError for one that cannot be had."""
    if name not in {"auto", "pillow", "simplejpeg"}:
        raise UserError(f"data.decoder is {name!r}", "use auto, pillow or simplejpeg")
    if name == "pillow" or (name == "auto" and image_format != "jpg"):
        return "pillow"
    if image_format != "jpg":
        what = f"data.decoder is 'simplejpeg', which reads JPEG only, but the pictures are {image_format}"
        raise UserError(what, "set data.decoder to auto")
    if problem := unusable():
        if name == "auto":
            return "pillow"
        raise UserError(f"data.decoder is 'simplejpeg', but {problem[0]}", problem[1])
    return "simplejpeg"


@functools.cache
def unusable() -> tuple[str, str] | None:
    """What keeps simplejpeg from being used here, and the remedy; None if nothing does."""
    try:
        _library()
    except ImportError as error:
        return f"it cannot be imported: {error}", "pip install 'sivae-dist[jpeg]', or set data.decoder to auto"
    for data, channels in _probes():
        for reduce in REDUCTIONS:
            with Image.open(io.BytesIO(data)) as image:
                image.draft(None, (image.width // reduce, image.height // reduce))
                expected = np.asarray(image)
            found = np.empty((*expected.shape[:2], channels), dtype=np.uint8)
            if not decode_into(data, found, reduce) or not np.array_equal(found, expected.reshape(found.shape)):
                return (
                    "it decodes other pixels than Pillow does",
                    "set data.decoder to auto or pillow, or install the versions in constraints.txt",
                )
    return None


def decode_into(data: bytes, out: Pixels, reduce: int = 1) -> bool:
    """Decodes into out (H, W, 3 or 1), contiguous. False, with anything in `out`, where Pillow is to be asked.

    reduce: 1, 2, 4 or 8 times as many pixels a side are stored, see `decode.decode_into`.
    """
    library = _library()
    height, width, channels = out.shape
    space, stored = _SPACES[channels]
    try:
        # The header first: nothing is decompressed unless it is what `out` has room for.
        if library.decode_jpeg_header(data)[:3] != (reduce * height, reduce * width, stored):
            return False
        # The least scale that gives so many pixels, which is 1 / reduce.
        library.decode_jpeg(data, space, min_height=height, min_width=width, buffer=out)
    except (ValueError, RuntimeError):  # what it raises is not documented further
        return False
    return True


def announces(data: bytes, side: int, channels: int) -> bool:
    """Whether a JPEG's header promises side x side pixels, of colours or of grey as there are channels."""
    try:
        if unusable() is None:
            return bool(_library().decode_jpeg_header(data)[:3] == (side, side, _SPACES[channels][1]))
        with open_image(data, formats=("JPEG",)) as image:
            return image.size == (side, side) and image.mode == {1: "L", 3: "RGB"}[channels]
    except (UserError, OSError, SyntaxError, ValueError, RuntimeError):
        return False


@functools.cache
def _library() -> ModuleType:
    import simplejpeg  # noqa: PLC0415 (an optional package)

    module: ModuleType = simplejpeg
    return module


def _probes() -> list[tuple[bytes, int]]:
    """Small noisy JPEGs that end within a block: all subsamplings, fine and coarse quantisation, progressive, grey."""
    noise = hash64(key(0, "jpeg probe"), np.arange(40 * 56 * 3, dtype=np.uint64)) >> np.uint64(58)
    slopes = np.add.outer(np.arange(40) * 4, np.arange(56) * 3)[..., None] // np.array([1, 2, 3]) % 192
    colour = Image.fromarray((slopes + noise.reshape(40, 56, 3).astype(np.int64)).astype(np.uint8))
    settings = [("RGB", {"quality": q, "subsampling": s}) for q, s in ((95, 0), (75, 1), (60, 2), (98, 2))]
    settings += [("RGB", {"quality": 90, "subsampling": 0, "progressive": True}), ("L", {"quality": 95})]
    probes = []
    for mode, options in settings:
        file = io.BytesIO()
        colour.convert(mode).save(file, "JPEG", **options)
        probes.append((file.getvalue(), 3 if mode == "RGB" else 1))
    return probes
