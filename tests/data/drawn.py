"""Pictures, folders of them and hand-made shard folders for the tests of the data room."""

from __future__ import annotations

import hashlib
import io
import json
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from sivae_dist.data.manifest import FILE_NAME, Manifest, checksum
from sivae_dist.data.shard_write import ShardWriter


def picture(number: int, size: int = 24) -> np.ndarray:
    """A distinct picture (size, size, 3) whose mean colour tells its number even after JPEG."""
    rng = np.random.default_rng(number)
    return (rng.integers(0, 60, (size, size, 3)) + rng.integers(0, 196, 3)).astype(np.uint8)


def png(array: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(array).save(out, "PNG")
    return out.getvalue()


def draw_folder(folder: Path, count: int, *, size: int = 24, classes: int = 0) -> Path:
    for number in range(count):
        place = folder / f"class{number % classes}" if classes else folder
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture(number, size)).save(place / f"{number:04d}.png")
    return folder


def craft(folder: Path, samples, *, resolution=8, classes=0, image_format="png", shards=1) -> Path:
    """A shard folder of given bytes, [(key, data, label)], which the packer would never write."""
    folder.mkdir(parents=True, exist_ok=True)
    infos = []
    for number in range(shards):
        writer = ShardWriter(folder, f"shard-{number:06d}", "train", folder)
        for key, data, label in samples[number::shards]:
            writer.add(key, image_format, data, label, {})
        infos.append(writer.finish())
    manifest = Manifest("crafted", "none", resolution, 3, image_format, classes, (), tuple(infos))
    (folder / FILE_NAME).write_bytes(manifest.to_bytes())
    return folder


def edit_manifest(folder: Path, change) -> None:
    """Applies change(dict) to the manifest's JSON; its checksum is made to fit, as a hostile author would."""
    raw = json.loads((folder / FILE_NAME).read_text())
    change(raw)
    if isinstance(raw, dict) and "checksum" in raw:
        raw["checksum"] = checksum(raw)
    (folder / FILE_NAME).write_text(json.dumps(raw))


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.is_file()}


def rows(folder, shard):
    return [json.loads(line) for line in (folder / f"{shard}.index").read_text().splitlines()[1:]]


def spoil(folder, shard, number, data=None):
    """Other bytes in the place of a picture. With data: also the right checksums, as if it had been packed so."""
    row = rows(folder, shard)[number]
    path = folder / f"{shard}.tar"
    tar = bytearray(path.read_bytes())
    if data is None:
        tar[row[1] + row[2] // 2] ^= 1
        path.write_bytes(tar)
        return
    data = data.ljust(row[2], b"\0")[: row[2]]
    tar[row[1] : row[1] + row[2]] = data
    path.write_bytes(tar)
    lines = (folder / f"{shard}.index").read_text().splitlines()
    row[3] = zlib.crc32(data)
    lines[number + 1] = json.dumps(row)
    (folder / f"{shard}.index").write_text("".join(f"{line}\n" for line in lines))
    digest = hashlib.sha256((folder / f"{shard}.index").read_bytes()).hexdigest()

    def fit(manifest):
        next(s for s in manifest["shards"] if s["name"] == shard)["index_sha256"] = digest

    edit_manifest(folder, fit)
