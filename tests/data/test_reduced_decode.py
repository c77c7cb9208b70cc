"""Pictures decoded smaller than they are packed (`data.reduce`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sivae_dist.data import jpeg
from sivae_dist.data.decode import decode, decode_into, encode
from sivae_dist.data.loader import ShardsConfig
from sivae_dist.data.pack import pack
from sivae_dist.data.pack_shard import PackOptions
from sivae_dist.data.pyramid import addresses_of
from sivae_dist.data.shard_read import ShardReader
from sivae_dist.data.sources.scenes import ScenesSource
from sivae_dist.data.store import open_store
from sivae_dist.errors import UserError

SIDE = 64
REDUCTIONS = [2, 4, 8]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root: Path = tmp_path_factory.mktemp("scenes") / "shards"
    pack(ScenesSource(24, val_count=4), root, PackOptions(SIDE, shard_size="9"), workers=1, progress=False)
    return root


def pictures(root: Path, image_format: str, channels: int) -> list[bytes]:
    """Scenes as this format holds them."""
    manifest = ShardsConfig(url=str(root)).build(seed=0, salt=0, rank=0, ranks=1).manifest
    reader = ShardReader(open_store(str(root)), manifest, manifest.of("train"))
    scenes = [Image.fromarray(reader.read(0, number).image.transpose(1, 2, 0)) for number in range(3)]
    return [encode(scene.convert("RGB" if channels == 3 else "L"), image_format) for scene in scenes]


def box(data: bytes, image_format: str, reduce: int, channels: int) -> np.ndarray[Any, Any]:
    """The definition: means over blocks of the whole picture, in float64."""
    whole = decode(data, resolution=SIDE, channels=channels, image_format=image_format)
    small = SIDE // reduce
    blocks = whole.transpose(1, 2, 0).astype(np.float64).reshape(small, reduce, small, reduce, channels)
    return np.asarray(blocks.mean(axis=(1, 3)))


@pytest.mark.parametrize("channels", [3, 1])
@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("image_format", ["jpg", "png", "webp"])
def test_blocks_become_their_mean(root: Path, image_format: str, reduce: int, channels: int) -> None:
    """Exactly but for rounding; a JPEG's lowest frequencies are not quite the mean, and rounded as colours differ."""
    for data in pictures(root, image_format, channels):
        out = np.empty((SIDE // reduce, SIDE // reduce, channels), dtype=np.uint8)
        decode_into(data, out, image_format=image_format, reduce=reduce)
        error = np.abs(out - box(data, image_format, reduce, channels))
        if image_format == "jpg":
            assert error.mean() < 1.5
            assert error.max() < 40
        else:
            assert error.max() <= 0.5 + 1e-9


@pytest.mark.parametrize("channels", [3, 1])
@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_both_decoders_give_the_same_pixels(root: Path, reduce: int, channels: int) -> None:
    for data in pictures(root, "jpg", channels):
        one, other = (np.empty((SIDE // reduce, SIDE // reduce, channels), dtype=np.uint8) for _ in range(2))
        decode_into(data, one, image_format="jpg", reduce=reduce)
        assert jpeg.decode_into(data, other, reduce)
        assert np.array_equal(one, other)


@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_a_picture_of_another_size_is_refused(root: Path, reduce: int) -> None:
    """Also one that has the right size already."""
    for side in (SIDE // reduce, SIDE + 8):
        data = encode(Image.new("RGB", (side, side)), "jpg")
        out = np.empty((SIDE // reduce, SIDE // reduce, 3), dtype=np.uint8)
        assert not jpeg.decode_into(data, out, reduce)
        with pytest.raises(UserError, match=f"is {side}x{side} pixels, expected {SIDE}x{SIDE}"):
            decode_into(data, out, image_format="jpg", reduce=reduce)


@pytest.mark.parametrize("decoder", ["pillow", "simplejpeg"])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_of_smaller_pictures(root: Path, decoder: Any, workers: int) -> None:
    """The same samples at the same positions; held-out ones, too."""
    config = ShardsConfig(url=str(root), reduce=2, decoder=decoder, workers=workers, lanes=4)
    stream = config.build(seed=1, salt=0, rank=0, ranks=1)
    assert stream.sample_shape == (3, SIDE // 2, SIDE // 2)
    batches = stream.batches(0, 5)
    reader = ShardReader(open_store(str(root)), stream.manifest, stream.manifest.of("train"))
    for _ in range(3):
        batch = next(batches)
        assert batch.data.shape == (5, 3, SIDE // 2, SIDE // 2)
        for position, found in zip(batch.position.tolist(), batch.data, strict=True):
            shard, number = stream.plan.locate(np.array([position]))
            expected = np.empty((SIDE // 2, SIDE // 2, 3), dtype=np.uint8)
            reader.read_into(int(shard[0]), int(number[0]), expected, reduce=2)
            assert np.array_equal(found.permute(1, 2, 0).numpy(), expected)
    assert stream.held_out(4)[0].data.shape == (4, 3, SIDE // 2, SIDE // 2)
    stream.close()


def test_wrong_wishes(root: Path) -> None:
    for reduce in (0, 3, 16, -2):
        with pytest.raises(UserError, match=rf"data\.reduce is {reduce} for pictures of {SIDE} pixels") as told:
            ShardsConfig(url=str(root), reduce=reduce).build(seed=0, salt=0, rank=0, ranks=1)
        assert "1, 2, 4, 8" in told.value.fix


def test_a_pyramid_gives_the_level_to_reduce(tmp_path: Path) -> None:
    source = ScenesSource(6, val_count=2)
    for side in (16, 32):
        pack(source, tmp_path / str(side), PackOptions(side), workers=1, progress=False)
    if not addresses_of(str(tmp_path)):
        pytest.fail("these are no levels")
    config = ShardsConfig(url=str(tmp_path), reduce=2)
    assert config.at((3, 16, 16)).url == f"{tmp_path}/32"
    with pytest.raises(UserError, match=r"with data\.reduce 2 the model takes 64"):
        config.at((3, 32, 32))
