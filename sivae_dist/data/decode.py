"""Pictures: opening them safely, bringing any mode to RGB or grey, the transform of the packer, encode and decode."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from sivae_dist.errors import UserError

MAX_PIXELS = 1 << 27  # 134 million, below the size at which Pillow itself refuses
_PILLOW_NAMES = {"jpg": "JPEG", "webp": "WEBP", "png": "PNG"}
# An explicit list: Pillow also knows formats (EPS) that start other programs.
READABLE = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM")
QUALITY = 95
_TRANSPARENT = ("RGBA", "RGBa", "LA", "La", "PA")


def open_image(file: bytes | Path, *, max_pixels: int = MAX_PIXELS, formats: tuple[str, ...] = READABLE) -> Image.Image:
    """Opens a picture and checks its size before any pixel is decompressed.

    Raises UserError when it is no picture of these formats or has more than max_pixels, OSError when unreadable.
    """
    source = io.BytesIO(file) if isinstance(file, bytes) else file
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit is stricter
            image = Image.open(source, formats=formats)
    except UnidentifiedImageError:
        raise UserError(f"not a picture of a known format ({', '.join(formats)})", "convert or remove it") from None
    except Image.DecompressionBombError:
        raise UserError(f"a picture of more than {max_pixels} pixels", "make it smaller or remove it") from None
    width, height = image.size
    if width * height > max_pixels:
        image.close()
        what = f"a picture of {width}x{height} pixels, more than the limit of {max_pixels}"
        raise UserError(what, "make it smaller or remove it")
    return image


def to_channels(image: Image.Image, channels: int) -> Image.Image:
    """Mode "RGB" (channels 3) or "L" (1) from any mode that has a defined range.

    16-bit grey is scaled, not cut off. Transparency is laid over white, as browsers show it. CMYK and others follow
    Pillow's conversion. Embedded colour profiles are not applied. Raises UserError for floating-point pictures.
    """
    if image.mode == "F":
        raise UserError("a floating-point picture, whose range is not defined", "convert it to 8 or 16 bits")
    if image.mode == "I" or image.mode.startswith("I;16"):
        wide = np.clip(np.asarray(image).astype(np.int64), 0, 65535)
        image = Image.fromarray(((wide + 128) // 257).astype(np.uint8))
    if image.mode in _TRANSPARENT or "transparency" in image.info:
        image = image.convert("RGBA")
        ground = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(ground, image)
    mode = "RGB" if channels == 3 else "L"
    return image if image.mode == mode else image.convert(mode)


def square(image: Image.Image, channels: int) -> Image.Image:
    """Turned upright (EXIF), RGB or grey, cut to the centre square: what of a picture is stored, at its own size."""
    image = to_channels(ImageOps.exif_transpose(image), channels)
    width, height = image.size
    side = min(width, height)
    if width != height:
        left, top = (width - side) // 2, (height - side) // 2
        image = image.crop((left, top, left + side, top + side))
    image.info = {}  # else Pillow would copy profiles and comments into the encoded file
    return image


def prepare(image: Image.Image, resolution: int, channels: int) -> Image.Image:
    """The packer's transform: `square`, and Lanczos to resolution x resolution. A square picture comes as it is."""
    return resized(square(image, channels), resolution)


def resized(image: Image.Image, resolution: int) -> Image.Image:
    """A square picture in resolution x resolution pixels, by Lanczos."""
    if image.size == (resolution, resolution):
        return image
    return image.resize((resolution, resolution), Image.Resampling.LANCZOS)


def encode(image: Image.Image, image_format: str, quality: int | None = None) -> bytes:
    """The bytes of a prepared picture. quality: 1..100 for jpg and webp (None means 95); jpg keeps colour at 4:4:4."""
    options: dict[str, Any] = {
        "jpg": {"quality": quality or QUALITY, "subsampling": 0},
        "webp": {"quality": quality or QUALITY, "method": 4},
        "png": {"compress_level": 6},
    }[image_format]
    out = io.BytesIO()
    image.save(out, _PILLOW_NAMES[image_format], **options)
    return out.getvalue()


def decode(data: bytes, *, resolution: int, channels: int, image_format: str) -> npt.NDArray[np.uint8]:
    """(channels, resolution, resolution) uint8 from the bytes of a shard's picture.

    Raises UserError when the bytes are not an undamaged picture of exactly that size and format.
    """
    pixels = np.empty((resolution, resolution, channels), dtype=np.uint8)
    decode_into(data, pixels, image_format=image_format)
    return np.array(pixels.transpose(2, 0, 1), order="C")


def decode_into(data: bytes, out: npt.NDArray[np.uint8], *, image_format: str, reduce: int = 1) -> None:
    """The same into out (H, W, channels), as decoders make pixels and without another copy.

    reduce: 1, 2, 4 or 8; the picture has reduce H x reduce W pixels, whose blocks of reduce x reduce become one: their
    mean, or for JPEGs what libjpeg's inverse transform makes of the block's lowest frequencies, which decodes less.
    """
    height, width, channels = out.shape
    stored = (reduce * width, reduce * height)
    try:
        image = open_image(data, formats=(_PILLOW_NAMES[image_format],))
        if image.size != stored:
            raise UserError(f"is {image.size[0]}x{image.size[1]} pixels, expected {stored[0]}x{stored[1]}")
        if reduce > 1 and image_format == "jpg":
            image.draft(None, (width, height))
        image = to_channels(image, channels)
        if image.size == stored and reduce > 1:
            image = image.reduce(reduce)
        out[:] = np.asarray(image).reshape(out.shape)
    except (UserError, MemoryError):
        raise
    except Exception as error:  # on damaged files Pillow raises OSError, SyntaxError, ValueError, struct.error, ...
        raise UserError(f"cannot be decoded: {error}") from None
