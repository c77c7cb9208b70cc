"""Damaged or hostile data: told by the real command line, with what to do, and nothing that was good is lost."""

from __future__ import annotations

import hashlib
import json
import struct
import tarfile
import zlib
from pathlib import Path

import pytest
from commands import Runner, checkpoints, refused, write_config
from PIL import Image


def training_fails(run: Runner, tmp_path: Path, shards: Path, *says: str, **changes: dict) -> None:
    config = write_config(tmp_path / "config.yaml", shards, **changes)
    refused(run("train", "--config", config, "--out", tmp_path / "run"), *says)


def pictures(folder: Path, count: int = 4, size: int = 20) -> Path:
    for number in range(count):
        folder.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((size, size), 40 + number).convert("RGB").save(folder / f"{number}.png")
    return folder


def resigned(shards: Path, name: str) -> None:
    """Makes the manifest agree with a shard that was tampered with: a stranger would do that."""
    path = shards / "manifest.json"
    manifest = json.loads(path.read_text())
    entry = next(s for s in manifest["shards"] if s["name"] == name)
    for end, key in (("tar", "sha256"), ("index", "index_sha256")):
        entry[key] = hashlib.sha256((shards / f"{name}.{end}").read_bytes()).hexdigest()
    del manifest["checksum"]
    path.write_text(json.dumps(manifest))


def test_empty_folder(run: Runner, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    refused(run("data", "pack", tmp_path / "empty", tmp_path / "out", "--resolution", 16), "'empty' has no pictures")
    refused(run("data", "pack", tmp_path / "absent", tmp_path / "out", "--resolution", 16), "is no folder")


@pytest.mark.parametrize("resolution", [0, -3, 100000])
def test_resolution_out_of_range(run: Runner, tmp_path: Path, resolution: int) -> None:
    source = pictures(tmp_path / "pictures", 1)
    done = run("data", "pack", source, tmp_path / "out", "--resolution", resolution)
    refused(done, f"resolution is {resolution}", "1 to 8192")


def test_corrupt_jpegs_are_skipped_and_listed(run: Runner, tmp_path: Path) -> None:
    source = pictures(tmp_path / "pictures")
    Image.open(source / "0.png").save(source / "cut.jpg", quality=95)
    whole = (source / "cut.jpg").read_bytes()
    (source / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (source / "text.jpg").write_text("no picture at all")
    done = run("data", "pack", source, tmp_path / "out", "--resolution", 16)
    assert done.status == 0, done
    assert "Traceback" not in done.output
    skipped = {e["key"]: e["reason"] for e in json.loads((tmp_path / "out/skipped.json").read_text())}
    assert skipped.keys() == {"cut", "text"}
    assert "4 samples" in done.stdout


def test_only_corrupt_pictures(run: Runner, tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures/a.jpg").write_bytes(b"\xff\xd8\xff" + bytes(200))
    refused(run("data", "pack", tmp_path / "pictures", tmp_path / "out", "--resolution", 16), "can be read")


def bomb(path: Path, side: int = 60_000) -> None:
    """A small PNG file that says it is side x side pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    data = zlib.compress(bytes(1 << 20))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b""))


def test_decompression_bomb(run: Runner, tmp_path: Path) -> None:
    source = pictures(tmp_path / "pictures", 2)
    bomb(source / "bomb.png")
    done = run("data", "pack", source, tmp_path / "out", "--resolution", 16)
    assert done.status == 0, done
    (entry,) = json.loads((tmp_path / "out/skipped.json").read_text())
    assert entry["key"] == "bomb"
    assert "pixels" in entry["reason"]


def test_bomb_inside_a_shard(run: Runner, shards: Path, tmp_path: Path) -> None:
    index = (shards / "shard-000000.index").read_text().splitlines()
    rows = [json.loads(line) for line in index[1:]]
    bomb(tmp_path / "bomb.png")
    data = (tmp_path / "bomb.png").read_bytes()[: rows[0][2]]
    tar = bytearray((shards / "shard-000000.tar").read_bytes())
    tar[rows[0][1] : rows[0][1] + rows[0][2]] = data.ljust(rows[0][2], b"\0")
    rows[0][3] = zlib.crc32(data.ljust(rows[0][2], b"\0"))
    (shards / "shard-000000.tar").write_bytes(tar)
    (shards / "shard-000000.index").write_text("".join(f"{line}\n" for line in [index[0], *map(json.dumps, rows)]))
    resigned(shards, "shard-000000")
    training_fails(run, tmp_path, shards, "shard-000000.tar", "pixels")


def test_truncated_tar(run: Runner, shards: Path, tmp_path: Path) -> None:
    path = shards / "shard-000001.tar"
    path.write_bytes(path.read_bytes()[:-3000])
    training_fails(run, tmp_path, shards, "shard-000001.tar is truncated", "data verify")
    refused(run("data", "verify", shards, "--workers", 1), "damaged: shard-000001")


def test_corrupt_sample(run: Runner, shards: Path, tmp_path: Path) -> None:
    row = json.loads((shards / "shard-000001.index").read_text().splitlines()[3])
    tar = bytearray((shards / "shard-000001.tar").read_bytes())
    tar[row[1] + row[2] // 2] ^= 0x10
    (shards / "shard-000001.tar").write_bytes(tar)
    training_fails(run, tmp_path, shards, f"shard-000001.tar: sample {row[0]!r} is damaged: its checksum differs")


def test_what_was_trained_before_the_damage_is_kept(run: Runner, shards: Path, tmp_path: Path) -> None:
    """The run ends at the damaged sample with a checkpoint; with the shard copied again the same command goes on."""
    good = {path: path.read_bytes() for path in shards.glob("shard-*.tar")}
    config = write_config(tmp_path / "c.yaml", shards, checkpoint={"every_kimg": 100}, data={"workers": 0, "lanes": 1})
    command = ("train", "--config", config, "--out", tmp_path / "run")
    damage_every_shard_but_the_first_read(run, shards, command, tmp_path)
    (name,) = checkpoints(tmp_path / "run")
    assert 0 < int(name.removeprefix("nimg-")) < 60
    for path, data in good.items():
        path.write_bytes(data)
    done = run(*command)
    assert done.status == 0, done
    assert checkpoints(tmp_path / "run")[-1] == "nimg-000000060"


def damage_every_shard_but_the_first_read(run: Runner, shards: Path, command: tuple, tmp_path: Path) -> None:
    """With one lane the shards are read one after the other: damage all that an uninterrupted epoch reads later."""
    from sivae_dist.data.manifest import Manifest
    from sivae_dist.data.plan import Plan

    manifest = Manifest.from_bytes((shards / "manifest.json").read_bytes(), "manifest")
    infos = manifest.of("train")
    shard, _ = Plan([i.count for i in infos], lanes=1, window=16).locate(range(10))
    for number, info in enumerate(infos):
        if number not in set(shard.tolist()):
            data = bytearray((shards / f"{info.name}.tar").read_bytes())
            data[600:] = bytes(len(data) - 600)
            (shards / f"{info.name}.tar").write_bytes(data)
    refused(run(*command), "checksum differs")


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda text: text.replace("[", "{", 1), "does not match the manifest: its sha256 differs"),
        (lambda text: "", "does not match the manifest"),
    ],
)
def test_index_that_does_not_match_its_shard(run: Runner, shards: Path, tmp_path: Path, damage, says: str) -> None:
    path = shards / "shard-000000.index"
    path.write_text(damage(path.read_text()))
    training_fails(run, tmp_path, shards, "shard-000000.index", says)


def test_index_of_another_shard(run: Runner, shards: Path, tmp_path: Path) -> None:
    (shards / "shard-000000.index").write_bytes((shards / "shard-000001.index").read_bytes())
    resigned(shards, "shard-000000")
    training_fails(run, tmp_path, shards, "shard-000000")


def test_missing_shard(run: Runner, shards: Path, tmp_path: Path) -> None:
    (shards / "shard-000001.tar").unlink()
    training_fails(run, tmp_path, shards, "shard-000001.tar is missing", "copy the file again")


def test_path_traversal_in_a_tar(run: Runner, shards: Path, tmp_path: Path) -> None:
    path = shards / "shard-000000.tar"
    header = tarfile.TarInfo("../../outside.png")
    header.size = int(path.read_bytes()[124:135], 8)
    path.write_bytes(header.tobuf(tarfile.USTAR_FORMAT) + path.read_bytes()[512:])
    resigned(shards, "shard-000000")
    done = run("data", "verify", shards, "--workers", 1)
    refused(done, "damaged: shard-000000")
    assert "'../../outside.png', which is not allowed" in done.stdout
    assert not list(tmp_path.rglob("outside*"))


def test_path_traversal_in_the_manifest(run: Runner, shards: Path, tmp_path: Path) -> None:
    manifest = json.loads((shards / "manifest.json").read_text())
    manifest["shards"][0]["name"] = "../../etc/passwd"
    del manifest["checksum"]
    (shards / "manifest.json").write_text(json.dumps(manifest))
    training_fails(run, tmp_path, shards, "'../../etc/passwd', expected letters")


def test_hostile_names_are_not_sent_to_the_terminal(run: Runner, shards: Path) -> None:
    manifest = json.loads((shards / "manifest.json").read_text())
    manifest["name"], manifest["license"] = "\x1b[2J\x1b]0;gone\x07", "\ud800"
    del manifest["checksum"]
    (shards / "manifest.json").write_text(json.dumps(manifest))
    done = run("data", "info", shards)
    assert "Traceback" not in done.output
    assert "\x1b" not in done.output and "\x07" not in done.output


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ({"image_size": 32}, "the data have shape 3 x 16 x 16, the model takes 3 x 32 x 32"),
        ({"channels_in": 1}, "the data have shape 3 x 16 x 16, the model takes 1 x 16 x 16"),
        ({"image_size": 18}, "model.image_size is 18"),
        ({"image_size": 0}, "model.image_size is 0"),
        ({"channels": []}, "model.channels is ()"),
        ({"condition_dim": 3}, "model.condition_dim is 3, the data have 4 classes"),
    ],
)
def test_data_and_model_that_do_not_fit(run: Runner, packed: Path, tmp_path: Path, model: dict, says: str) -> None:
    training_fails(run, tmp_path, packed, says, model=model)


def test_wrong_channel_count_of_the_packer(run: Runner, tmp_path: Path) -> None:
    done = run("data", "pack", pictures(tmp_path / "p", 1), tmp_path / "out", "--resolution", 16, "--channels", 2)
    assert done.status == 2 and "Traceback" not in done.output and "invalid choice '2'" in done.output


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("", "data.url is empty"),
        ("nowhere", "'nowhere' is no folder"),
        ("pipe:curl http://127.0.0.1/", "would run a shell command"),
    ],
)
def test_no_data(run: Runner, tmp_path: Path, url: str, says: str) -> None:
    config = write_config(tmp_path / "config.yaml", url)
    refused(run("train", "--config", config, "--out", tmp_path / "run"), says)
