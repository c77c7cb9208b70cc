"""`data.decode gpu`: the whole way of unopened pictures, with libjpeg in nvJPEG's place; nvJPEG itself on a GPU."""

from __future__ import annotations

import io
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from drawn import draw_folder, edit_manifest, picture, spoil
from PIL import Image

from sivae_dist.data import device_decode, jpeg
from sivae_dist.data.ahead import DevicePrefetcher
from sivae_dist.data.loader import ShardsConfig
from sivae_dist.data.pack import pack
from sivae_dist.data.pack_shard import PackOptions
from sivae_dist.data.sources.folder import FolderSource
from sivae_dist.errors import UserError

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """41 labelled JPEGs of 16 px in shards of up to 7; 5 held out."""
    root = tmp_path_factory.mktemp("photos")
    source = FolderSource(draw_folder(root / "raw", 41, classes=3), labels=True)
    pack(source, root / "shards", PackOptions(16, shard_size="7", val_count=5), workers=1, progress=False)
    return root / "shards"


@pytest.fixture
def folder(photos, tmp_path) -> Path:
    return Path(shutil.copytree(photos, tmp_path / "damaged"))


@pytest.fixture
def on_cpu(monkeypatch) -> list[int]:
    """libjpeg decodes where nvJPEG would; the sizes of the batches it was given."""
    asked: list[int] = []

    def choose(image_format, channels, reduce):
        decode = device_decode.on_cpu(channels, 16)

        def counted(jpegs):
            asked.append(len(jpegs))
            return decode(jpegs)

        return counted

    monkeypatch.setattr(device_decode, "choose", choose)
    return asked


def stream(url, **config):
    settings = {"workers": 0, "lanes": 8, "window": 4, "shift_px": 2, "hue": 0.1} | config
    return ShardsConfig(url=str(url), **settings).build(seed=5, salt=0, rank=0, ranks=1)


def served(url, *, start=0, size=6, count=8, **config):
    """Batches as the training loop gets them, and the faults."""
    source = stream(url, **config)
    batches, faults = DevicePrefetcher(source.batches(start, size), CPU, early=True), []
    found = []
    for _ in range(count):
        batch = next(batches)
        faults += [(f.position, f.shard, f.number, f.key, f.reason, f.data) for f in (batch.report or no).faults]
        found.append((batch.to(CPU, (-1.0, 1.0)).x, batch.position.clone(), batch.label.clone()))
        batches.ahead()
    source.close()
    return found, faults


no = SimpleNamespace(faults=[])


def assert_same(found, expected):
    for one, two in zip(found[0], expected[0], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert found[1] == expected[1]


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_those_that_workers_decode(photos, on_cpu, workers):
    assert_same(served(photos, workers=workers, decode="gpu"), served(photos))
    assert set(on_cpu) == {6}
    assert_same(served(photos, workers=workers, decode="gpu", start=17, size=5), served(photos, start=17, size=5))


DAMAGE = {
    "crc": lambda f: spoil(f, "shard-000001", 3),
    "no picture": lambda f: spoil(f, "shard-000001", 3, b"no picture"),
    "only a good header": lambda f: spoil(f, "shard-000001", 3, small_jpeg(16).replace(b"\xff\xdb", b"\xff\xfe")),
    "another size": lambda f: spoil(f, "shard-000001", 3, small_jpeg(8)),
    "missing": lambda f: (f / "shard-000001.tar").unlink(),
}


def small_jpeg(size: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture(3, size)).save(file, "JPEG", quality=95, subsampling=0)
    return file.getvalue()


@pytest.mark.parametrize("damage", DAMAGE)
def test_faults_and_replacements_are_those_of_the_plain_way(folder, on_cpu, damage):
    """The quick ways, with simplejpeg in the worker and unopened, against Pillow one by one."""
    DAMAGE[damage](folder)
    common = {"on_error": "quarantine", "max_skipped": 100.0}
    expected = served(folder, decoder="pillow", **common)
    assert expected[1]
    for way in ({"decoder": "simplejpeg"}, {"decode": "gpu"}, {"decode": "gpu", "workers": 1}):
        assert_same(served(folder, **way, **common), expected)
    with pytest.raises(UserError) as plain:
        served(folder, decoder="pillow")
    for way in ({"decoder": "simplejpeg"}, {"decode": "gpu"}):
        with pytest.raises(UserError) as error:
            served(folder, **way)
        assert error.value.what == plain.value.what


def test_what_only_the_cpu_decodes_is_decoded_there(photos, on_cpu, monkeypatch):
    """nvJPEG may refuse what libjpeg takes: no fault, the same batch."""
    inner = device_decode.choose

    def picky(*arguments):
        decode = inner(*arguments)

        def refuse(jpegs):
            if any(one.sum() % 3 == 0 for one in jpegs):
                raise RuntimeError("unsupported")
            return decode(jpegs)

        return refuse

    monkeypatch.setattr(device_decode, "choose", picky)
    assert_same(served(photos, decode="gpu"), served(photos))
    assert 1 in on_cpu


@pytest.mark.parametrize("workers", [0, 1])
def test_bytes_travel_in_slots_and_beside_them(photos, on_cpu, workers):
    """Slots have the size of the first batches; they are free again once a batch is decoded."""
    for size, fits in ((6, True), (lambda start: 1 if start < 2 else 12, False)):
        source, plain = (stream(photos, decode=decode, workers=workers) for decode in ("gpu", "cpu"))
        found, expected = source.batches(0, size), plain.batches(0, size)
        opens, places = found._opens, []
        found._opens = lambda batch, reads, opens=opens, places=places: (
            places.append(batch.place) or opens(batch, reads)
        )
        for _ in range(12):
            assert torch.equal(next(found).data, next(expected).data)
        assert [place is not None for place in places] == [True] * 2 + [fits] * 10
        assert workers or found._pictures.slots.busy() == 0
        found._opens = opens
        source.close()
        plain.close()


def test_held_out_pictures_are_decoded_by_the_cpu(photos, on_cpu):
    found, expected = (stream(photos, **c).held_out(5) for c in ({"decode": "gpu"}, {}))
    assert all(torch.equal(a.data, b.data) for a, b in zip(found, expected, strict=True))
    assert on_cpu == []


def test_what_cannot_be_is_said(photos, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="torch finds no CUDA device") as error:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        stream(photos, decode="gpu")
    assert "sivae-dist[nvjpeg]" in error.value.fix
    with pytest.raises(UserError, match="nvJPEG decodes at full size only"):
        stream(photos, decode="gpu", reduce=2)
    with pytest.raises(UserError, match=r"data\.decode is 'tpu', expected cpu or gpu"):
        stream(photos, decode="tpu")
    png = Path(shutil.copytree(photos, tmp_path / "png"))
    edit_manifest(png, lambda raw: raw.update(image_format="png"))
    with pytest.raises(UserError, match="reads JPEG only, but the pictures are png"):
        stream(png, decode="gpu")


def test_a_library_that_is_missing_or_wrong_is_not_used(monkeypatch):
    monkeypatch.setattr(device_decode, "nvjpeg", lambda channels, device: device_decode.on_cpu(channels, 48))
    assert device_decode._unusable_on.__wrapped__(0) == ""

    def upside_down(channels, device):
        return lambda jpegs: device_decode.on_cpu(channels, 48)(jpegs).flip(2)

    monkeypatch.setattr(device_decode, "nvjpeg", upside_down)
    assert "decodes other pictures" in device_decode._unusable_on.__wrapped__(0)

    def without(channels, device):
        raise RuntimeError("decode_jpegs_cuda: torchvision not compiled with nvJPEG support")

    monkeypatch.setattr(device_decode, "nvjpeg", without)
    assert "not compiled with nvJPEG" in device_decode._unusable_on.__wrapped__(0)
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "torchvision.io", None)
    assert "cannot be imported" in device_decode._unusable_on.__wrapped__(0)


def test_a_header_is_looked_at_before_bytes_are_sent_on(monkeypatch):
    grey = io.BytesIO()
    Image.fromarray(picture(1, 16)).convert("L").save(grey, "JPEG")
    for known in (None, ("pretend it is missing", "")):
        monkeypatch.setattr(jpeg, "unusable", lambda known=known: known)
        assert jpeg.announces(small_jpeg(16), 16, 3)
        assert jpeg.announces(grey.getvalue(), 16, 1)
        for data, side, channels in ((small_jpeg(8), 16, 3), (small_jpeg(16), 16, 1), (grey.getvalue(), 16, 3)):
            assert not jpeg.announces(data, side, channels)
        assert not jpeg.announces(b"no picture", 16, 3)


@pytest.mark.gpu
@pytest.mark.parametrize("workers", [0, 2])
def test_nvjpeg_differs_from_libjpeg_by_a_few_of_255(photos, workers):
    """Full colour resolution, quality 95, as the packer writes: IDCT and colours are rounded in another way."""
    pytest.importorskip("torchvision")
    found, expected = (stream(photos, **c).batches(0, 6) for c in ({"decode": "gpu", "workers": workers}, {}))
    for _ in range(20):
        one, two = next(found), next(expected)
        assert one.data.is_cuda
        assert one.position.tolist() == two.position.tolist()
        difference = (one.data.cpu().float() - two.data.float()).abs()
        assert difference.max() <= 6
        assert difference.mean() <= device_decode.MEAN_DIFFERENCE
        assert np.array_equal(one.label.cpu(), two.label)
