"""The data commands as a user types them."""

from __future__ import annotations

import zipfile

import pytest
import tyro
from drawn import craft, draw_folder, picture, png

from sivae_dist.cli import commands
from sivae_dist.data.loader import ShardsConfig
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
    assert "1 x not a picture of a known format" in out
    assert "for example class0/0000" in out
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


def test_a_zip_is_known_by_being_a_file(tmp_path, capsys):
    with zipfile.ZipFile(tmp_path / "birds.zip", "w") as archive:
        for number in range(4):
            archive.writestr(f"kind{number % 2}/{number}.png", png(picture(number)))
    run("data pack", tmp_path / "birds.zip", tmp_path / "out", "--resolution", 16, "--labels", "--workers", 1)
    assert "4 samples (train 4)" in capsys.readouterr().out
    run("data info", tmp_path / "out")
    out = capsys.readouterr().out
    assert "birds: 16x16 RGB" in out
    assert "kind0, kind1" in out


def test_a_pyramid_of_a_recipe(tmp_path, capsys):
    for number in range(6):
        draw_folder(tmp_path / "root" / "images1024x1024", 6)
        (tmp_path / f"root/images1024x1024/{number:04d}.png").rename(
            tmp_path / f"root/images1024x1024/{59997 + number:05d}.png"
        )
    arguments = ("--recipe", "ffhq", "--root", tmp_path / "root", tmp_path / "out", "--resolution", "16,8")
    with pytest.raises(UserError, match="has 6 of the 70,000 pictures"):
        run("data pack", *arguments)
    run("data pack", *arguments, "--partial", "--workers", 1)
    out = capsys.readouterr().out
    assert f"{tmp_path}/out/8: 6 samples (train 3, val 3) in 2 shards" in out
    run("data info", tmp_path / "out")
    out = capsys.readouterr().out
    assert "8x8: train 3, val 3 in 2 shards" in out
    assert "ffhq: 16x16 RGB, jpg" in out
    run("data verify", tmp_path / "out")
    assert capsys.readouterr().out.count("6 of 6 samples") == 2
    tar = tmp_path / "out" / "16" / "shard-000000.tar"
    tar.write_bytes(tar.read_bytes()[:-700])
    with pytest.raises(UserError, match="16 is damaged: shard-000000"):
        run("data verify", tmp_path / "out")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["pictures", "--resolution", "8"], "two places are needed"),
        (["pictures", "out", "--root", "root", "--resolution", "8"], "two places are needed"),
        (["pictures", "out", "--resolution", "8x8"], "resolution is '8x8', expected pixels"),
        (["pictures", "out", "--resolution", "8,"], "resolution is '8,', expected pixels"),
        (["pictures", "out", "--resolution", "8", "--workers", "-1"], "workers is -1, expected 0 to 4096"),
        (["pictures", "out", "--resolution", "8", "--recipe", "fhq"], "recipe.name is 'fhq'"),
    ],
)
def test_wrong_arguments(arguments, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    draw_folder(tmp_path / "pictures", 2)
    with pytest.raises(UserError, match=text):
        run("data pack", *arguments)


def test_a_missing_folder_is_an_error(tmp_path):
    with pytest.raises(UserError, match="is no folder"):
        run("data pack", tmp_path / "none", tmp_path / "out", "--resolution", 16)


def test_a_home_folder_that_nobody_knows(tmp_path):
    raw, home = draw_folder(tmp_path / "raw", 1), "~nobody-of-that-name/x"
    for arguments in (
        ("data info", home),
        ("data info", f"file://{home}"),
        ("data verify", home),
        ("data pack", home, tmp_path / "out", "--resolution", 8),
        ("data pack", raw, home, "--resolution", 8),
        ("data pack", raw, tmp_path / "out", "--resolution", 8, "--val-list", home),
        *(("data pack", "--recipe", r, "--root", home, tmp_path / "out", "--resolution", 8) for r in ("ffhq", "zip")),
    ):
        with pytest.raises(UserError, match="names a home folder that is not known"):
            run(*arguments)
    with pytest.raises(UserError, match="not known"):
        ShardsConfig(url="https://host/x", cache_dir=home).check()
