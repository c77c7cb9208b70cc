"""The data commands as a user types them."""

from __future__ import annotations

import pytest
import tyro
from drawn import craft, draw_folder, picture, png

from sivae_dist.cli import commands
from sivae_dist.errors import UserError


def run(command: str, *arguments) -> None:
    tyro.cli(commands()[command], args=[str(a) for a in arguments])


def test_pack_info_verify(tmp_path, capsys):
    raw = draw_folder(tmp_path / "birds", 10, classes=2)
    (raw / "class0" / "0000.png").write_bytes(b"no")
    arguments = [
        "--resolution",
        16,
        "--format",
        "webp",
        "--shard-size",
        4,
        "--val-count",
        2,
        "--labels",
        "--workers",
        1,
    ]
    run("data pack", raw, tmp_path / "out", *arguments, "--license", "CC0-1.0")
    out = capsys.readouterr().out
    assert "9 samples" in out
    assert "class0/0000: not a picture of a known format" in out
    assert "9 pictures were smaller than 16 pixels" not in out
    run("data info", tmp_path / "out")
    out = capsys.readouterr().out
    for text in ("birds: 16x16 RGB, webp", "CC0-1.0", "train ", "val ", "class0, class1", "fingerprint"):
        assert text in out
    run("data verify", tmp_path / "out")
    assert "9 of 9 samples" in capsys.readouterr().out


def test_verify_of_a_damaged_folder_is_an_error(tmp_path, capsys):
    good = png(picture(0, 8))
    folder = craft(tmp_path / "s", [("a", good, None), ("b", good[:-60], None)])
    with pytest.raises(UserError, match="is damaged: shard-000000"):
        run("data verify", folder)
    out = capsys.readouterr().out
    assert "1 of 2 samples" in out
    assert "'b': cannot be decoded" in out


def test_drawn_scenes(tmp_path, capsys):
    few = ("--resolution", 16, "--count", 6, "--val-count", 2)
    run("data scenes", tmp_path / "out", *few)
    assert "6 scenes of 16x16 (train 4, val 2)" in capsys.readouterr().out
    run("data scenes", tmp_path / "out", *few)
    assert "2 shards were finished before" in capsys.readouterr().out
    with pytest.raises(UserError, match="is no folder"):  # one command for each kind of source
        run("data pack", "scenes:6", tmp_path / "other", "--resolution", 16)


def test_a_missing_folder_is_an_error(tmp_path):
    with pytest.raises(UserError, match="is no folder"):
        run("data pack", tmp_path / "none", tmp_path / "out", "--resolution", 16)
