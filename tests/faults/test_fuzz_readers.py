"""Readers of untrusted bytes: whatever they are fed, they succeed or raise UserError, soon and in little memory."""

from __future__ import annotations

import hashlib
import json
import resource
import shutil
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from commands import SMALL, checkpoints
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mutations import DEEP, changed_bytes, changed_json, text_of

from sivae_dist.data.manifest import Manifest, checksum
from sivae_dist.data.pyramid_file import PyramidFile
from sivae_dist.data.shard_read import ShardReader
from sivae_dist.data.store import FolderStore
from sivae_dist.data.stores.base import Events, Expected
from sivae_dist.data.verify import verify
from sivae_dist.engine import checkpoint
from sivae_dist.engine.config import from_dict, read_yaml, to_dict
from sivae_dist.engine.ema import Ema, EmaConfig
from sivae_dist.errors import UserError

# The second number is for the slow run.
FEW_AND_MANY = [40, pytest.param(4000, marks=pytest.mark.slow)]
LABORIOUS_S = 30.0  # of the processor; every honest example takes milliseconds
MOST_MEMORY_KIB = 400 << 10


@pytest.fixture(autouse=True)
def _little_memory() -> Iterator[None]:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MOST_MEMORY_KIB


def holds(count: int, strategy: st.SearchStrategy[Any], read: Callable[[Any], object]) -> None:
    """`read` succeeds or raises UserError with a short message for `count` examples, none of which is laborious."""

    @settings(
        max_examples=count,
        deadline=None,  # wall time depends on who else is there
        database=None,
        derandomize=count < 100,
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def check(example: Any) -> None:
        begin = time.process_time()
        try:
            read(example)
        except UserError as error:
            assert len(str(error)) < 3000
        assert time.process_time() - begin < LABORIOUS_S

    check()


class Memory:
    """A store whose files lie in memory."""

    url = "memory"
    manifest_name = "manifest.json"

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files
        self.events = Events()

    def expect(self, files: Mapping[str, Expected]) -> None:
        pass

    def size(self, name: str) -> int:
        return len(self._get(name))

    def read(self, name: str, offset: int, length: int) -> bytes:
        assert 0 <= length <= 1 << 30
        return self._get(name)[offset : offset + length]

    def whole(self, name: str, limit: int) -> bytes:
        assert len(self._get(name)) <= limit
        return self._get(name)

    def forget(self, name: str, offset: int, length: int) -> bool:
        return False

    def prepare(self, wanted: Sequence[tuple[str, int, int]]) -> None:
        pass

    def close(self) -> None:
        pass

    def _get(self, name: str) -> bytes:
        if name not in self.files:
            raise UserError(f"{name} is missing")
        return self.files[name]


@pytest.fixture(scope="module")
def files(packed: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in packed.iterdir() if path.is_file()}


@pytest.mark.parametrize("count", FEW_AND_MANY)
def test_manifest(count: int, files: dict[str, bytes]) -> None:
    valid = files["manifest.json"]
    changed = st.one_of(changed_bytes(valid), changed_json(json.loads(valid)).map(text_of), st.just(DEEP.encode()))

    def read(data: bytes) -> None:
        manifest = Manifest.from_bytes(data, "manifest")
        assert len(manifest.fingerprint) == 64
        manifest.splits()
        for shard in manifest.shards:
            assert "/" not in shard.name and shard.count >= 0

    holds(count, changed, read)


@pytest.mark.parametrize("count", FEW_AND_MANY)
@pytest.mark.parametrize("signed", [True, False])
def test_pyramid_file(count: int, signed: bool) -> None:
    valid = PyramidFile(((8, "0" * 64), (16, "1" * 64))).to_bytes()

    def sign(raw: Any) -> Any:
        return raw | {"checksum": checksum(raw)} if signed and isinstance(raw, dict) else raw

    changed = changed_json(json.loads(valid)).map(sign).map(text_of)

    def read(data: bytes) -> None:
        found = PyramidFile.from_bytes(data, "pyramid")
        assert list(found.resolutions) == sorted(set(found.resolutions))
        assert all(len(found.fingerprint(side)) == 64 for side in found.resolutions)

    holds(count, st.one_of(changed, changed_bytes(valid), st.just(DEEP.encode())), read)


def test_long_values_are_shortened_in_messages(files: dict[str, bytes]) -> None:
    """Found by the fuzzing above: a message of 100 kB."""
    valid = json.loads(files["manifest.json"])
    for name in ("image_format", "version", "format", "resolution", "class_names"):
        with pytest.raises(UserError) as told:
            Manifest.from_bytes(text_of({**valid, name: "x" * 100_000}), "manifest")
        assert len(str(told.value)) < 500


def rows_of(files: dict[str, bytes]) -> list[Any]:
    return [json.loads(line) for line in files["shard-000000.index"].splitlines()]


@pytest.mark.parametrize("count", FEW_AND_MANY)
def test_index_that_a_stranger_signed(count: int, files: dict[str, bytes]) -> None:
    """Head and rows are changed, the manifest agrees with them as far as it can; then every sample is read."""
    manifest = Manifest.from_bytes(files["manifest.json"], "manifest")
    lines = changed_json(rows_of(files)).map(lambda rows: b"\n".join(text_of(row) for row in rows))
    valid = files["shard-000000.index"]

    def read(index: bytes) -> None:
        entry = json.loads(files["manifest.json"])
        entry["shards"][0] |= {
            "index_sha256": hashlib.sha256(index).hexdigest(),
            "count": max(0, len(index.splitlines()) - 1),
        }
        signed = Manifest.from_bytes(json.dumps(entry).encode(), "manifest")
        reader = ShardReader(Memory({**files, "shard-000000.index": index}), signed, signed.shards)
        for number in range(min(3, signed.shards[0].count)):
            image = reader.read(0, number).image
            assert image.shape == (3, 16, 16) and image.dtype == np.uint8

    assert manifest.shards[0].name == "shard-000000"
    holds(count, st.one_of(changed_bytes(valid), lines, st.just(DEEP.encode())), read)


@pytest.mark.parametrize("count", FEW_AND_MANY)
@pytest.mark.parametrize("image_format", ["png", "jpg", "webp"])
def test_pictures_with_a_right_checksum(count: int, image_format: str, files: dict[str, bytes]) -> None:
    from PIL import Image

    from sivae_dist.data.decode import decode, encode

    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 16, 3), dtype=np.uint8))
    valid = encode(noise, image_format)

    def read(data: bytes) -> None:
        zlib.crc32(data)
        image = decode(data, resolution=16, channels=3, image_format=image_format)
        assert image.shape == (3, 16, 16)

    holds(count, changed_bytes(valid), read)


@pytest.mark.parametrize("count", [8, pytest.param(600, marks=pytest.mark.slow)])
def test_tar_members(count: int, packed: Path, files: dict[str, bytes], tmp_path: Path) -> None:
    """The tar is changed and signed anew; `data verify` walks it and reports."""
    folder = Path(shutil.copytree(packed, tmp_path / "shards"))
    raw = json.loads(files["manifest.json"])
    raw["shards"] = raw["shards"][:1]
    del raw["checksum"]
    tar = files["shard-000000.tar"]

    def read(data: bytes) -> None:
        (folder / "shard-000000.tar").write_bytes(data)
        raw["shards"][0] |= {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
        (folder / "manifest.json").write_text(json.dumps(raw))
        report = verify(str(folder), workers=1, progress=False)
        assert all(len(line) < 2000 for line in report.problems)
        assert {p.name for p in tmp_path.iterdir()} == {"shards"}

    holds(count, changed_bytes(tar), read)


@pytest.fixture(scope="module")
def saved(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    newest = trained / "checkpoints" / checkpoints(trained)[-1]
    return Path(shutil.copytree(newest, tmp_path_factory.mktemp("copy") / newest.name))


def read_checkpoint(folder: Path, name: str, data: bytes, *, sign: bool) -> None:
    """Reads and restores a checkpoint one of whose files is `data`."""
    before = {n: (folder / n).read_bytes() for n in (name, "files.json")}
    try:
        (folder / name).write_bytes(data)
        if sign:
            listing = json.loads(before["files.json"])
            listing[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            (folder / "files.json").write_text(json.dumps(listing))
        snapshot = checkpoint.read(folder)
        config = from_dict(snapshot.state.get("config", {}), "state.json")
        small = config.model == from_dict({"model": SMALL["model"]}, "x").model
        if small:  # another architecture would be refused before it is built: see resume.find
            model = config.model.build()
            players = {"encoder": model.encoder, "decoder": model.decoder}
            checkpoint.restore(snapshot, model, Ema(EmaConfig(), model).model, config.optim.build(players))
    finally:
        for n, valid in before.items():
            (folder / n).write_bytes(valid)


@pytest.mark.parametrize("count", FEW_AND_MANY)
@pytest.mark.parametrize("name", ["state.json", "files.json"])
def test_checkpoint_json(count: int, name: str, saved: Path) -> None:
    valid = (saved / name).read_bytes()
    changed = st.one_of(changed_bytes(valid), changed_json(json.loads(valid)).map(text_of), st.just(DEEP.encode()))
    holds(count, changed, lambda data: read_checkpoint(saved, name, data, sign=name != "files.json"))


@pytest.mark.parametrize("count", FEW_AND_MANY)
@pytest.mark.parametrize("name", ["weights.safetensors", "optimizer.safetensors"])
def test_checkpoint_tensors(count: int, name: str, saved: Path) -> None:
    valid = (saved / name).read_bytes()
    size = int.from_bytes(valid[:8], "little")
    head = json.loads(valid[8 : 8 + size])

    def with_head(changed: Any) -> bytes:
        text = text_of(changed)
        return len(text).to_bytes(8, "little") + text + valid[8 + size :]

    changed = st.one_of(changed_bytes(valid), changed_bytes(valid[: 8 + size]), changed_json(head).map(with_head))
    holds(count, changed, lambda data: read_checkpoint(saved, name, data, sign=True))


@pytest.mark.parametrize("count", FEW_AND_MANY)
def test_yaml_config(count: int, tmp_path: Path) -> None:
    valid = yaml.safe_dump({**SMALL, "optim": {"encoder": {"lr": "1e-4"}, "milestones_kimg": [1, 2]}})
    path = tmp_path / "c.yaml"

    def read(data: bytes) -> None:
        path.write_bytes(data)
        config = from_dict(read_yaml(path), "c.yaml")
        assert from_dict(to_dict(config), "again") == config

    json_is_yaml = changed_json(to_dict(from_dict(SMALL, "small"))).map(text_of)
    holds(count, st.one_of(changed_bytes(valid.encode()), json_is_yaml), read)


def test_the_reader_of_a_folder_never_leaves_it(tmp_path: Path) -> None:
    """Names come from manifests, which forbid all but plain ones: the store itself is the second line."""
    store = FolderStore(tmp_path)
    with pytest.raises(UserError):
        store.read("absent.tar", 0, 10)
