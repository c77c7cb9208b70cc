"""sample, reconstruct, interpolate and mix as a user types them."""

from __future__ import annotations

import csv
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import tyro
from PIL import Image
from saving import RESIDUAL, save

from sivae_dist import load
from sivae_dist.apps.mix import layer_numbers
from sivae_dist.cli import commands
from sivae_dist.errors import UserError
from sivae_dist.evaluation.grids import cells

Runs = dict[str, Path]
Command = Callable[..., str]


@pytest.fixture
def do(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """Runs a command in an empty folder and returns what it prints."""
    monkeypatch.chdir(tmp_path)

    def call(command: str, *arguments: object) -> str:
        tyro.cli(commands()[command], args=[str(a) for a in arguments], use_underscores=False)
        return capsys.readouterr().out

    return call


def pixels(path: Path | str) -> np.ndarray:
    return np.asarray(Image.open(path))


def draw_pictures(folder: Path, *sizes: tuple[int, int]) -> Path:
    folder.mkdir()
    for i, (width, height) in enumerate(sizes):
        noise = np.random.default_rng(i).integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"p{i}.png")
    return folder


# ---- sample


def test_single_files_are_the_samples(do: Command, runs: Runs) -> None:
    said = do("sample", runs["style"], "--n", 5, "--seed", 2, "--out", "s", "--batch", 2)
    assert said == "5 samples of seed 2: s/seed2-*.png\n"
    names = sorted(path.name for path in Path("s").iterdir())
    assert names == [f"seed2-{k:06d}.png" for k in range(5)]
    expected = cells(load(runs["style"]).sample(5, 2), (-1.0, 1.0), min_cell=1)
    for name, picture in zip(names, expected, strict=True):
        assert np.abs(pixels(f"s/{name}").astype(int) - picture).max() <= 1


@pytest.mark.parametrize("name", ["style", "residual", "conditional", "growing"])
def test_a_grid_holds_every_sample_and_repeats_to_the_byte(do: Command, runs: Runs, name: str) -> None:
    do("sample", runs[name], "--n", 10)
    first = Path("samples.png").read_bytes()
    do("sample", runs[name], "--n", 10, "--out", "again.png")
    assert Path("again.png").read_bytes() == first
    trained = load(runs[name])
    labels = torch.arange(10) % 3 if name == "conditional" else None
    x = trained.sample(10, 0, None if labels is None else trained.condition(labels, 10))
    picture = pixels("samples.png").astype(int)
    side = cells(x[:1], trained.input_range or (0, 1)).shape[1]
    bottom, right = picture.shape[0] - 10 - 2 * side - 2, 10
    for k, cell in enumerate(cells(x, trained.input_range or (0, 1))):
        top, left = bottom + (k // 8) * (side + 2), right + (k % 8) * (side + 2)
        assert np.abs(picture[top : top + side, left : left + side] - cell).max() <= 1, k


def test_label_seed_and_weights_matter(do: Command, runs: Runs) -> None:
    for i, more in enumerate([(), ("--seed", 1), ("--no-average",), ("--label", 1)]):
        do("sample", runs["conditional"], "--n", 4, "--out", f"{i}", *more)
    for i in (1, 2, 3):
        assert (pixels(f"0/seed0-{0:06d}.png") != pixels(f"{i}/seed{int(i == 1)}-{0:06d}.png")).any()
    assert (pixels("0/seed0-000001.png") == pixels("3/seed0-000001.png")).all()  # sample 1 is of class 1 anyway
    with pytest.raises(UserError, match="label 3 is no class"):
        do("sample", runs["conditional"], "--label", 3, "--out", "x")


def test_points_become_numbers(do: Command, runs: Runs) -> None:
    do("sample", runs["points"], "--n", 40, "--out", "p.npy")
    do("sample", runs["points"], "--n", 40, "--out", "p.csv")
    expected = load(runs["points"]).sample(40)
    np.testing.assert_allclose(np.load("p.npy", allow_pickle=False), expected, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(np.loadtxt("p.csv", delimiter=","), expected, rtol=1e-5, atol=1e-7)
    for command, more in [("sample", ()), ("reconstruct", ("--data", ".")), ("interpolate", ("--seeds", 1, 2))]:
        with pytest.raises(UserError, match=r"model \(mlp\) makes data of shape \(2,\), not pictures"):
            do(command, runs["points"], *more)


def test_a_sweep_ends_at_the_samples(do: Command, runs: Runs) -> None:
    do("sample", runs["style"], "--n", 3, "--truncation-sweep", 0, 1, "--noise", "fixed")
    picture = pixels("samples.png").astype(int)
    rows = [picture[-10 - (2 - i) * 98 + 2 :][:96, -10 - 3 * 98 + 2 : -10] for i in range(2)]
    average = rows[0][:, :96]
    assert np.abs(rows[0][:, 98:194] - average).max() <= 1  # psi 0: everybody is average
    expected = np.concatenate(list(cells(load(runs["style"]).sample(3, noise="fixed"), (-1.0, 1.0))), axis=1)
    shown = np.concatenate([rows[1][:, i * 98 : i * 98 + 96] for i in range(3)], axis=1)
    assert np.abs(shown - expected).max() <= 1
    for more in (("--psi", 0.5), ("--label", 0)):
        with pytest.raises(UserError, match="goes with neither"):
            do("sample", runs["style"], "--truncation-sweep", 0, *more, "--out", "x.png")


def test_no_styles_no_truncation(do: Command, runs: Runs) -> None:
    for more in (("--psi", 0.5), ("--truncation-sweep", 0, 1)):
        with pytest.raises(UserError, match="has no styles"):
            do("sample", runs["residual"], *more)
    assert not list(Path().iterdir())


def test_nothing_is_overwritten_unasked(do: Command, runs: Runs, tmp_path: Path) -> None:
    Path("taken.png").write_text("mine")
    Path("full").mkdir()
    Path("full/mine").write_text("mine")
    Path("empty").mkdir()
    for out in ("taken.png", "full"):
        with pytest.raises(UserError, match="is there already"):
            do("sample", runs["style"], "--n", 1, "--out", out)
    do("sample", runs["style"], "--n", 1, "--out", "empty")
    do("sample", runs["style"], "--n", 1, "--out", "full", "--force")
    assert Path("full/mine").read_text() == "mine"
    do("sample", runs["style"], "--n", 1, "--out", "taken.png", "--force")
    assert pixels("taken.png").ndim == 3
    for out, message in [("x.tiff", "has the ending '.tiff'"), ("taken.png/x.png", "is no folder")]:
        with pytest.raises(UserError, match=message):
            do("sample", runs["style"], "--n", 1, "--out", out)


# ---- reconstruct


def test_reconstruct_of_a_pyramid(do: Command, runs: Runs, tmp_path: Path) -> None:
    """The level of the model is taken; a growing one's is that of its finest, averaged down."""
    do("data scenes", tmp_path / "pyramid/16", "--count", 12, "--resolution", 16, "--val-count", 4)
    for name in ("residual", "growing"):
        for data in ("pyramid", "pyramid/16"):
            said = do("reconstruct", runs[name], "--data", data, "--out", f"{name}-{Path(data).name}.png")
            assert said.count("scene-") == 4
        assert Path(f"{name}-16.png").read_bytes() == Path(f"{name}-pyramid.png").read_bytes()
    with pytest.raises(UserError, match="holds pictures of 16 pixels, the model takes 32"):
        do("reconstruct", save(tmp_path / "wide", {**RESIDUAL, "image_size": 32}), "--data", "pyramid")


def test_reconstruct_pictures(do: Command, runs: Runs) -> None:
    folder = draw_pictures(Path("in"), (16, 16), (40, 30), (16, 16))
    said = do("reconstruct", runs["residual"], "--data", folder, "--report", "r.csv", "--batch", 2)
    assert "1 of 3 pictures were cropped to a square or resized to 16x16" in said
    rows = list(csv.DictReader(Path("r.csv").read_text().splitlines()))
    assert [row["name"] for row in rows] == ["p0", "p1", "p2"]
    trained = load(runs["residual"])
    x = torch.from_numpy(pixels("in/p0.png").copy()).permute(2, 0, 1)[None] / 255
    mse = (trained.reconstruct(x) - x).square().mean()
    assert float(rows[0]["psnr"]) == pytest.approx(float(-10 * mse.log10()), abs=1e-3)
    told = json.loads(
        do("reconstruct", runs["residual"], "--data", folder, "--json", "--report", "r.json", "--out", "b.png")
    )
    assert told["mean_psnr"] == pytest.approx(np.mean([float(row["psnr"]) for row in rows]), abs=1e-3)
    assert json.loads(Path("r.json").read_text())["images"] == told["images"]
    assert Path("b.png").read_bytes() == Path("reconstructions.png").read_bytes()
    do("reconstruct", runs["residual"], "--data", folder, "--sample-posterior", "--out", "c.png")
    assert Path("c.png").read_bytes() != Path("b.png").read_bytes()
    with pytest.raises(UserError, match=r"r\.csv is there already"):
        do("reconstruct", runs["residual"], "--data", folder, "--report", "r.csv", "--out", "d.png")


def test_reconstruct_packed_pictures(do: Command, runs: Runs) -> None:
    """The held-out split, at the size of a model that still grows, with the data set's own classes."""
    do("data scenes", "data", "--resolution", 16, "--count", 9, "--val-count", 4, "--workers", 1)
    said = do("reconstruct", runs["growing"], "--data", "data")
    assert len(re.findall("^scene-", said, re.M)) == 4
    assert "4 of 4 pictures were cropped to a square or resized to 8x8" in said
    with pytest.raises(UserError, match="the model wants 1 channels"):
        do("reconstruct", runs["conditional"], "--data", "data", "--out", "x.png")


def test_reconstruct_of_a_conditional_model_needs_labels(do: Command, runs: Runs) -> None:
    folder = draw_pictures(Path("in"), (16, 16))
    with pytest.raises(UserError, match="needs a label"):
        do("reconstruct", runs["conditional"], "--data", folder)
    do("reconstruct", runs["conditional"], "--data", folder, "--label", 2)
    with pytest.raises(UserError, match="unconditional"):
        do("reconstruct", runs["style"], "--data", folder, "--label", 2, "--out", "x.png")


def test_what_is_no_picture(do: Command, runs: Runs) -> None:
    Path("no.png").write_bytes(b"no")
    Path("empty").mkdir()
    for where, message in [
        ("no.png", r"no\.png: not a picture"),
        ("none", "no file or folder"),
        ("empty", "are no pic"),
    ]:
        with pytest.raises(UserError, match=message):
            do("reconstruct", runs["style"], "--data", where)


# ---- interpolate


def test_a_walk_in_every_form(do: Command, runs: Runs) -> None:
    walk = ("interpolate", runs["style"], "--seeds", 1, 2, 3, "--steps", 4)
    for out, more, frames in [("a", (), 9), ("b", ("--loop",), 12), ("c", ("--space", "style", "--psi", 0.7), 9)]:
        do(*walk, "--out", out, *more)
        assert len(list(Path(out).iterdir())) == frames
    trained = load(runs["style"])
    for frame, seed in [(0, 1), (4, 2), (8, 3)]:
        (station,) = cells(trained.sample(1, seed, noise="fixed"), (-1.0, 1.0), min_cell=1)
        assert np.abs(pixels(f"a/frame-{frame:05d}.png").astype(int) - station).max() <= 1
    do(*walk, "--out", "walk.gif", "--fps", 20)
    with Image.open("walk.gif") as film:
        assert film.n_frames == 9 and film.info["duration"] == 50 and film.size == (256, 256)
    do(*walk, "--loop")
    do(*walk, "--loop", "--out", "again.png")
    assert Path("walk.png").read_bytes() == Path("again.png").read_bytes()
    assert not list(Path().glob(".*"))


def test_a_film(do: Command, runs: Runs) -> None:
    ffmpeg = pytest.importorskip("imageio_ffmpeg")
    do("interpolate", runs["style"], "--seeds", 1, 2, "--steps", 8, "--out", "walk.mp4", "--fps", 24)
    assert ffmpeg.count_frames_and_secs("walk.mp4")[0] == 9
    reader = ffmpeg.read_frames("walk.mp4")
    seen = next(reader)
    assert seen["size"] == (256, 256) and seen["fps"] == 24 and seen["codec"] == "h264"
    first = np.frombuffer(next(reader), np.uint8).reshape(256, 256, 3).astype(int)
    reader.close()
    (station,) = cells(load(runs["style"]).sample(1, 1, noise="fixed"), (-1.0, 1.0), min_cell=256)
    assert np.abs(first.mean((0, 1)) - station.mean((0, 1))).max() < 8  # H.264 keeps colours at half resolution
    assert not list(Path().glob(".*"))


def test_a_walk_between_pictures(do: Command, runs: Runs) -> None:
    draw_pictures(Path("in"), (16, 16), (20, 16))
    do("interpolate", runs["residual"], "--images", "in/p0.png", "in/p1.png", "--steps", 2, "--out", "w")
    trained = load(runs["residual"])
    x = torch.from_numpy(pixels("in/p0.png").copy()).permute(2, 0, 1)[None] / 255
    (expected,) = cells(trained.reconstruct(x), (0.0, 1.0), min_cell=1)
    assert np.abs(pixels("w/frame-00000.png").astype(int) - expected).max() <= 1


def test_mistaken_walks(do: Command, runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    style, residual = runs["style"], runs["residual"]
    for run, words, message in [
        (style, (), "either --seeds or --images"),
        (style, ("--seeds", 1), "two stations or more"),
        (style, ("--seeds", 1, 2, "--space", "style", "--kind", "slerp"), "styles have no sphere"),
        (residual, ("--seeds", 1, 2, "--space", "style"), "has no styles"),
        (style, ("--seeds", 1, 2, "--steps", 0), "--steps is 0"),
        (style, ("--seeds", 1, 2, "--fps", 0), "--fps is 0"),
        (style, ("--images", "a.png", "b.png"), "neither a seed nor a picture"),
    ]:
        with pytest.raises(UserError, match=message):
            do("interpolate", run, *words)
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    with pytest.raises(UserError, match=r"needs the package imageio-ffmpeg[\s\S]*pip install 'sivae-dist\[video\]'"):
        do("interpolate", style, "--seeds", 1, 2, "--out", "w.mp4")
    assert not list(Path().iterdir())


# ---- mix


def test_a_matrix_of_styles(do: Command, runs: Runs) -> None:
    draw_pictures(Path("in"), (16, 16))
    do("mix", runs["style"], "--rows", 1, "in/p0.png", "--columns", 3, 4, 5, "--layers", "2-5")
    do("mix", runs["style"], "--rows", 1, "in/p0.png", "--columns", 3, 4, 5, "--layers", "2-5", "--out", "again.png")
    assert Path("mix.png").read_bytes() == Path("again.png").read_bytes()
    picture = pixels("mix.png").astype(int)
    trained = load(runs["style"])
    row, column = (trained.styles(trained.z(1, seed)) for seed in (1, 5))
    mixed = torch.cat([row[:, :2], column[:, 2:]], dim=1)
    (expected,) = cells(trained.synthesise(mixed), (-1.0, 1.0))
    top = picture.shape[0] - 10 - 2 * 96 - 2
    assert np.abs(picture[top : top + 96, -106:-10] - expected).max() <= 1  # first row, last column


def test_all_layers_give_the_column(do: Command, runs: Runs) -> None:
    do("mix", runs["growing"], "--rows", 1, 2, "--columns", 3, "--layers", "0-3")
    picture = pixels("mix.png").astype(int)
    (expected,) = cells(load(runs["growing"]).sample(1, 3, noise="fixed"), (-1.0, 1.0))
    side = len(expected)
    for up in (0, side + 2):
        bottom = picture.shape[0] - 10 - up
        assert np.abs(picture[bottom - side : bottom, -10 - side : -10] - expected).max() <= 1


def test_layers_by_name() -> None:
    by_level = {n: [4 << (i // 2) for i in range(2 * n)] for n in (1, 2, 3, 4, 5, 7, 9)}
    ends = {n: [(r.start, r.stop) for r in map(lambda t: layer_numbers(t, by_level[n]), ("coarse", "middle", "fine"))]
            for n in (3, 4, 5, 7, 9)}  # fmt: skip
    assert ends == {
        3: [(0, 2), (2, 4), (4, 6)],
        4: [(0, 2), (2, 4), (4, 8)],
        5: [(0, 4), (4, 8), (8, 10)],
        7: [(0, 4), (4, 8), (8, 14)],
        9: [(0, 4), (4, 8), (8, 18)],
    }
    assert layer_numbers("3", by_level[3]) == range(3, 4)
    for text, message in [
        ("fine", "leaves none"),
        ("4", "numbers from 0 to 3"),
        ("2-1", "lower one"),
        ("x", "no choice"),
    ]:
        with pytest.raises(UserError, match=message):
            layer_numbers(text, by_level[2])


def test_mistaken_matrices(do: Command, runs: Runs) -> None:
    with pytest.raises(UserError, match="has no styles"):
        do("mix", runs["residual"], "--rows", 1, "--columns", 2)
    with pytest.raises(UserError, match="neither a seed nor a picture"):
        do("mix", runs["style"], "--rows", "one", "--columns", 2)
