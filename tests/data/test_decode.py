"""Opening, converting and cutting pictures."""

from __future__ import annotations

import io

import numpy as np
import pytest
from drawn import picture, png
from PIL import Image

from sivae_dist.data.decode import decode, encode, open_image, prepare, to_channels
from sivae_dist.errors import UserError

RED = (200, 30, 40)


def saved(image: Image.Image, kind: str, **options) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientations_are_turned_upright(orientation):
    """A picture with one red corner, stored in each of the eight ways, always comes out with the corner top left."""
    upright = np.zeros((32, 32, 3), np.uint8)
    upright[:12, :20] = RED
    # What a camera stores so that a viewer, following the tag, shows `upright`.
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright),
        7: np.rot90(upright, 2).transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(Image.fromarray(np.ascontiguousarray(stored)), "PNG", exif=exif)
    np.testing.assert_array_equal(np.asarray(prepare(open_image(data), 32, 3)), upright)


def test_the_centre_square_is_cut():
    wide = np.zeros((10, 31, 3), np.uint8)
    wide[:, 10:20] = RED
    assert (np.asarray(prepare(Image.fromarray(wide), 10, 3)) == RED).all()
    tall = wide.transpose(1, 0, 2).copy()
    assert (np.asarray(prepare(Image.fromarray(tall), 10, 3)) == RED).all()


def test_resizing_is_lanczos_over_the_whole_square():
    array = picture(1, 40)
    expected = Image.fromarray(array).resize((16, 16), Image.Resampling.LANCZOS)
    np.testing.assert_array_equal(np.asarray(prepare(Image.fromarray(array), 16, 3)), np.asarray(expected))
    np.testing.assert_array_equal(np.asarray(prepare(Image.fromarray(array), 40, 3)), array)


def grey16(values) -> Image.Image:
    return Image.fromarray(np.asarray(values, dtype=np.uint16))


@pytest.mark.parametrize(
    ("image", "rgb"),
    [
        (Image.new("L", (4, 4), 77), (77, 77, 77)),
        (Image.new("1", (4, 4), 1), (255, 255, 255)),
        (Image.new("LA", (4, 4), (100, 0)), (255, 255, 255)),
        (Image.new("RGBA", (4, 4), (*RED, 255)), RED),
        (Image.new("RGBA", (4, 4), (0, 0, 0, 0)), (255, 255, 255)),
        (Image.new("RGBA", (4, 4), (0, 0, 0, 51)), (204, 204, 204)),
        (Image.new("RGB", (4, 4), RED).quantize(4), RED),
        (Image.new("CMYK", (4, 4), (0, 255, 255, 0)), (255, 0, 0)),
        (grey16(np.full((4, 4), 65535)), (255, 255, 255)),
        (grey16(np.full((4, 4), 257 * 12)), (12, 12, 12)),
        (Image.fromarray(np.full((4, 4), 257 * 200, np.int32)), (200, 200, 200)),
    ],
)
def test_modes_become_rgb_and_grey(image, rgb):
    pixels = np.asarray(to_channels(image, 3))
    assert pixels.shape == (4, 4, 3)
    assert np.abs(pixels.astype(int) - rgb).max() <= 1
    assert np.asarray(to_channels(image, 1)).shape == (4, 4)


def test_16_bit_and_palette_files_are_read_whole():
    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    for kind in ("PNG", "TIFF"):
        read = np.asarray(prepare(open_image(saved(grey16(ramp), kind)), 16, 1))
        np.testing.assert_array_equal(read, np.arange(256).reshape(16, 16))
    clear = Image.new("P", (4, 4), 0)
    clear.putpalette([*RED, 0, 0, 0])
    data = saved(clear, "PNG", transparency=0)
    assert (np.asarray(prepare(open_image(data), 4, 3)) == 255).all()


def test_floating_point_pictures_are_refused():
    with pytest.raises(UserError, match="range is not defined"):
        to_channels(Image.new("F", (4, 4)), 3)


@pytest.mark.parametrize("image_format", ["jpg", "webp", "png"])
@pytest.mark.parametrize("channels", [1, 3])
def test_encode_and_decode(image_format, channels):
    smooth = np.add.outer(np.arange(32) * 3, np.arange(32) * 4).astype(np.uint8)
    image = to_channels(Image.fromarray(np.stack([smooth, smooth // 2, 255 - smooth], -1)), channels)
    image.info["icc_profile"] = b"x" * 500
    prepared = prepare(image, 32, channels)
    data = encode(prepared, image_format)
    assert "icc_profile" not in Image.open(io.BytesIO(data)).info
    pixels = decode(data, resolution=32, channels=channels, image_format=image_format)
    assert pixels.shape == (channels, 32, 32)
    assert pixels.dtype == np.uint8
    assert pixels.flags.c_contiguous
    original = np.asarray(prepared).reshape(32, 32, channels).transpose(2, 0, 1)
    error = np.abs(pixels.astype(int) - original).mean()
    assert error == 0 if image_format == "png" else error < 4


def test_quality_changes_the_size():
    image = Image.fromarray(picture(1, 64))
    assert len(encode(image, "jpg", 50)) < len(encode(image, "jpg")) < len(encode(image, "jpg", 100))
    assert encode(image, "jpg") == encode(image, "jpg", 95)


def test_damaged_or_foreign_bytes_are_errors():
    arguments = {"resolution": 24, "channels": 3}
    good = saved(Image.fromarray(picture(1)), "JPEG")
    with pytest.raises(UserError, match=r"cannot be decoded: .*[Tt]runcated"):
        decode(good[: len(good) - 300], **arguments, image_format="jpg")
    with pytest.raises(UserError, match=r"cannot be decoded: .*[Tt]runcated"):
        decode(good[:300], **arguments, image_format="jpg")
    with pytest.raises(UserError, match="not a picture of a known format"):
        decode(good, **arguments, image_format="png")
    with pytest.raises(UserError, match="not a picture of a known format"):
        decode(b"", **arguments, image_format="png")
    with pytest.raises(UserError, match="is 8x8 pixels, expected 24x24"):
        decode(png(picture(1, 8)), **arguments, image_format="png")


def test_programs_disguised_as_pictures_are_not_started():
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n(x) print\n%%EOF\n"
    with pytest.raises(UserError, match="not a picture of a known format"):
        open_image(eps)
