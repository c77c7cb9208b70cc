"""simplejpeg decodes what Pillow decodes, bit for bit, or leaves it to Pillow."""

from __future__ import annotations

import io
from types import SimpleNamespace

import numpy as np
import pytest
from drawn import picture
from PIL import Image

from sivae_dist.data import jpeg
from sivae_dist.data.decode import decode_into
from sivae_dist.data.loader import ShardsConfig
from sivae_dist.data.pack import pack
from sivae_dist.data.pack_shard import PackOptions
from sivae_dist.data.sources.scenes import ScenesSource
from sivae_dist.errors import UserError


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    root = tmp_path_factory.mktemp("scenes") / "shards"
    pack(ScenesSource(24, val_count=4), root, PackOptions(33, shard_size="9"), workers=1, progress=False)
    return root


def saved(array: np.ndarray, mode: str = "RGB", **options) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).convert(mode).save(file, "JPEG", **options)
    return file.getvalue()


def both(data: bytes, shape: tuple[int, int, int]) -> tuple[bool, np.ndarray, np.ndarray]:
    fast, plain = np.full(shape, 7, np.uint8), np.empty(shape, np.uint8)
    taken = jpeg.decode_into(data, fast)
    decode_into(data, plain, image_format="jpg")
    return taken, fast, plain


@pytest.mark.parametrize("size", [1, 8, 17, 64, 131])
@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("progressive", [False, True])
def test_the_pixels_are_pillows(size, subsampling, progressive):
    for quality in (30, 75, 95, 100):
        data = saved(picture(size, size), quality=quality, subsampling=subsampling, progressive=progressive)
        taken, fast, plain = both(data, (size, size, 3))
        assert taken
        np.testing.assert_array_equal(fast, plain)


def test_grey_pictures():
    data = saved(picture(1, 19), "L", quality=90)
    taken, fast, plain = both(data, (19, 19, 1))
    assert taken
    np.testing.assert_array_equal(fast, plain)


def test_what_needs_converting_is_left_to_pillow():
    colour, grey, cmyk = (saved(picture(1, 16), mode) for mode in ("RGB", "L", "CMYK"))
    for data, channels in ((colour, 1), (grey, 3), (cmyk, 3)):
        assert not both(data, (16, 16, channels))[0]


def test_damage_is_left_to_pillow():
    """Whatever is cut off or changed: either Pillow is asked, or both give the same pixels."""
    good = saved(picture(3, 32))
    rng = np.random.default_rng(0)
    refused = 0
    for trial in range(200):
        bad = bytearray(good[: rng.integers(1, len(good))] if trial % 2 else good)
        for _ in range(3):
            bad[rng.integers(len(bad))] = rng.integers(256)
        fast, plain = np.empty((32, 32, 3), np.uint8), np.empty((32, 32, 3), np.uint8)
        if not jpeg.decode_into(bytes(bad), fast):
            refused += 1
            continue
        decode_into(bytes(bad), plain, image_format="jpg")
        np.testing.assert_array_equal(fast, plain)
    assert 100 <= refused < 200


def test_nothing_larger_than_expected_is_decompressed(monkeypatch):
    import simplejpeg

    only_headers = SimpleNamespace(decode_jpeg_header=simplejpeg.decode_jpeg_header)
    monkeypatch.setattr(jpeg, "_library", lambda: only_headers)
    assert not jpeg.decode_into(saved(picture(1, 64)), np.empty((32, 32, 3), np.uint8))


def batches(folder, **config):
    source = ShardsConfig(url=str(folder), lanes=4, window=4, **config).build(seed=1, salt=0, rank=0, ranks=1)
    served = source.batches(0, 6)
    found = [next(served) for _ in range(5)]
    held_out = source.held_out(4)
    source.close()
    return source.decoder, [b.data for b in found + held_out]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_sees_the_same_with_both(scenes, workers):
    used, expected = batches(scenes, workers=0, decoder="pillow")
    assert used == "pillow"
    for decoder in ("auto", "simplejpeg"):
        used, found = batches(scenes, workers=workers, decoder=decoder)
        assert used == "simplejpeg"
        for one, two in zip(found, expected, strict=True):
            np.testing.assert_array_equal(one.numpy(), two.numpy())


def test_a_library_with_other_pixels_is_not_used(monkeypatch):
    import simplejpeg

    def rough(data, *arguments, **options):
        return simplejpeg.decode_jpeg(data, *arguments, fastdct=True, fastupsample=True, **options)

    other = SimpleNamespace(decode_jpeg_header=simplejpeg.decode_jpeg_header, decode_jpeg=rough)
    monkeypatch.setattr(jpeg, "_library", lambda: other)
    jpeg.unusable.cache_clear()
    try:
        assert jpeg.choose("auto", "jpg") == "pillow"
        with pytest.raises(UserError, match="decodes other pixels than Pillow"):
            jpeg.choose("simplejpeg", "jpg")
    finally:
        jpeg.unusable.cache_clear()


def test_the_switch(monkeypatch):
    assert jpeg.choose("pillow", "jpg") == jpeg.choose("auto", "png") == "pillow"
    with pytest.raises(UserError, match="reads JPEG only, but the pictures are webp"):
        jpeg.choose("simplejpeg", "webp")
    with pytest.raises(UserError, match=r"data\.decoder is 'turbo'"):
        jpeg.choose("turbo", "jpg")

    def missing():
        raise ImportError("No module named 'simplejpeg'")

    monkeypatch.setattr(jpeg, "_library", missing)
    jpeg.unusable.cache_clear()
    try:
        assert jpeg.choose("auto", "jpg") == "pillow"
        with pytest.raises(UserError, match="cannot be imported"):
            jpeg.choose("simplejpeg", "jpg")
    finally:
        jpeg.unusable.cache_clear()
