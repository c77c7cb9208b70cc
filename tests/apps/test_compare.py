"""`sivae-dist compare` on small run folders made by hand: groups, marks, spreads, the sheet, and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from saving import MODULATED, RESIDUAL

from sivae_dist.apps import compare as app
from sivae_dist.apps import compare_report as report
from sivae_dist.cli import main
from sivae_dist.engine.config import from_dict, to_yaml
from sivae_dist.errors import UserError

COLOUR = (90, 10, 200)


def make(
    folder: Path,
    model: dict[str, Any],
    psnr: dict[int, float],
    *,
    seed: int = 0,
    batch: int = 10,
    pace: float = 1.0,
    data: str = "same",
    **sections: Any,
) -> Path:
    """A run evaluated at these images, `pace` seconds of training per image and half as many of CPU time."""
    values = {"model": model, "data": {"url": f"at/{folder.name}"}, "train": {"seed": seed, "batch": batch}}
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(to_yaml(from_dict({**values, **sections}, "test")))
    (folder / "manifest.json").write_text(json.dumps({"data": data}))
    rows: list[dict[str, float]] = []
    for nimg, value in psnr.items():
        times = {"time/train_s": pace * nimg, "time/cpu_s": pace * nimg / 2}
        rows += [{"nimg": nimg, "kl/real": 1.0, **times}, {"nimg": nimg, "eval/psnr": value, "eval/swd": 0.5, **times}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "samples").mkdir()
    for nimg in (5, 1000):
        grid = np.full((20, 30, 3), COLOUR if nimg == 1000 else (0, 0, 0), np.uint8)
        Image.fromarray(grid).save(folder / "samples" / f"nimg-{nimg:09d}.png")
    Image.fromarray(grid).save(folder / "samples" / "evaluate-nimg-000002000.png")
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """Two seeds of one, trained longer; one of another with another batch, which takes three times as long."""
    return [
        make(tmp_path / "plain-seed0", RESIDUAL, {0: 5.0, 100: 10.0, 200: 20.0, 300: 30.0}),
        make(tmp_path / "plain-seed1", RESIDUAL, {0: 5.0, 100: 12.0, 200: 23.0}, seed=1, tracking={"images": 3}),
        make(tmp_path / "styled", MODULATED, {0: 4.0, 104: 11.0, 200: 22.0}, batch=8, pace=3.0),
    ]


def read(paths: list[Path]) -> list[app.Group]:
    return app.grouped([app.read_run(path) for path in paths])


def test_runs_that_differ_in_the_seed_are_a_group(runs: list[Path]) -> None:
    groups = read(runs)
    assert [(g.label, len(g.runs)) for g in groups] == [("plain", 2), ("styled", 1)]
    different = app.differences(groups)
    assert different["model.name"] == ["residual", "modulated"]
    assert different["model.zdim"] == [6, None]
    assert different["train.batch"] == [10, 8]
    assert not {"train.seed", "data.url", "tracking.images", "objective.beta_neg"} & different.keys()


def test_another_setting_or_other_data_part_a_group(tmp_path: Path) -> None:
    one = make(tmp_path / "run-a", RESIDUAL, {0: 1.0})
    other = make(tmp_path / "run-b", RESIDUAL, {0: 1.0}, seed=1, objective={"beta_rec": 3.0})
    elsewhere = make(tmp_path / "run-c", RESIDUAL, {0: 1.0}, seed=2, data="other")
    groups = read([one, other, elsewhere])
    assert [g.label for g in groups] == ["run-a", "run-b", "run-c"]
    assert "did not see the same data" in report.text(groups, [])
    assert "did not see the same data" not in report.text(groups[:2], [])


def test_equal_images(runs: list[Path]) -> None:
    """The most that all have: 300 is one run's alone. A batch of 8 is evaluated at 104 where 100 was asked."""
    groups = read(runs)
    table = app.at_images(groups)
    plain, styled = table.rows
    assert (table.mark, plain.kimg, styled.kimg) == ("0.2 kimg", 0.2, 0.2)
    assert plain.figures["psnr"].mean == pytest.approx(21.5)
    assert plain.figures["psnr"].spread == pytest.approx(3 / math.sqrt(2))
    assert (styled.figures["psnr"].mean, styled.figures["psnr"].spread) == (22.0, None)
    at = app.at_images(groups, 0.1)
    assert [row.figures["psnr"].mean for row in at.rows] == [11.0, 11.0]
    assert at.rows[1].kimg == 0.104
    assert at.rows[1].seconds == {"train": pytest.approx(312.0), "cpu": pytest.approx(156.0)}


def test_equal_time(runs: list[Path]) -> None:
    """The run that trained least took 200 s; by then the slow one had only its first evaluation."""
    groups = read(runs)
    table = app.at_time(groups, "train")
    assert (table.mark, [row.kimg for row in table.rows]) == ("200 s", [0.2, 0.0])
    assert [row.figures["psnr"].mean for row in table.rows] == [21.5, 4.0]
    cpu = app.at_time(groups, "cpu", 156.0)
    assert [row.kimg for row in cpu.rows] == [pytest.approx(0.25), 0.104]
    assert cpu.mark == "156 CPU s"


def test_what_is_not_finite_is_seen(tmp_path: Path) -> None:
    groups = read([make(tmp_path / "a", RESIDUAL, {10: math.nan}), make(tmp_path / "b", RESIDUAL, {10: 3.0}, seed=1)])
    table = app.at_images(groups)
    assert math.isnan(table.rows[0].figures["psnr"].mean)
    assert "nan" in report.text(groups, [table])
    assert json.dumps(report.plain(groups, [table]), allow_nan=False)


def test_the_command_line(runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "result"
    main(["compare", *map(str, runs), "--out", str(out), "--timer", "cpu"])
    shown = capsys.readouterr().out
    lines = [line for line in shown.splitlines() if line.startswith("| plain ")]
    encoder = sum(p.numel() for p in from_dict({"model": RESIDUAL}, "test").model.build().encoder.parameters())
    assert lines[0].split("|")[2:5] == [" residual     ", " 0 1   ", f" {encoder:,}".ljust(len(lines[0].split("|")[4]))]
    assert "21.50 +- 2.12" in lines[1]
    assert "| setting" in shown and "After 0.2 kimg" in shown and "within 100 CPU s" in shown
    values = json.loads((out / "compare.json").read_text())
    assert [table["kind"] for table in values["tables"]] == ["images", "time"]
    assert values["tables"][0]["rows"][0]["figures"]["psnr"] == {
        "mean": 21.5,
        "spread": pytest.approx(2.1213, abs=1e-4),
        "runs": 2,
    }
    picture = np.asarray(Image.open(out / "samples.png"))
    assert ((picture == COLOUR).all(axis=2)).sum() == 3 * 20 * 30  # the newest grid of each, whole, and no other
    main(["compare", *map(str, runs), "--json", "--no-time"])
    assert [t["kind"] for t in json.loads(capsys.readouterr().out)["tables"]] == ["images"]


def test_growing_runs_compare_at_one_resolution_only(tmp_path: Path) -> None:
    """4 px for 100 images, 8 px for 100, then 16 px: told by the row, and of older runs by the configuration."""
    growth = {"enabled": True, "level_kimg": 0.1, "fade_kimg": 0.05, "batch": [10]}
    style = {"name": "style", "image_size": 16, "startf": 4, "maxf": 6, "latent_size": 5, "mapping_layers": 2}
    psnr = {0: 5.0, 100: 30.0, 200: 25.0, 300: 20.0}
    paths = [make(tmp_path / name, style, psnr, progressive=growth, seed=i) for i, name in enumerate(["old", "new"])]
    rows = [json.loads(line) for line in (paths[1] / "metrics.jsonl").read_text().splitlines()]
    for row, size in zip((row for row in rows if "eval/psnr" in row), (4, 4, 8, 16), strict=True):
        row["eval/resolution"] = float(size)
    (paths[1] / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    old, new = (app.read_run(path) for path in paths)
    assert [e.resolution for e in old.evaluations] == [e.resolution for e in new.evaluations] == [4, 4, 8, 16]
    assert new.evaluations[0].values.keys() == {"psnr", "swd"}

    groups = app.grouped([old, new, app.read_run(make(tmp_path / "whole", {**style, "maxf": 7}, psnr))])
    coarse, fine = app.at_images(groups, 0.2), app.at_images(groups)
    assert [row.resolutions for row in coarse.rows] == [[8], [16]]
    assert not report.alike(coarse) and report.alike(fine)
    said = report.text(groups, [coarse])
    assert f"at different resolutions there ({groups[0].label} 8 px, whole 16 px), so their metrics do not" in said
    assert "| pixels |" in said and "different resolutions" not in report.text(groups, [fine])
    assert "pixels" not in report.text(groups[1:], [app.at_images(groups[1:])])
    assert report.plain(groups, [coarse])["tables"][0]["rows"][0]["resolutions"] == [8]

    slow = make(tmp_path / "slow", style, psnr, progressive=growth, seed=2, pace=2.0)
    (row,) = app.at_time(app.grouped([old, app.read_run(slow)]), "train", 250.0).rows
    assert row.resolutions == [4, 8]  # seeds of one group at equal time


def refusal(*arguments: str) -> str:
    from sivae_dist.cli import _run

    with pytest.raises(UserError) as caught:
        _run(["compare", *arguments])
    assert caught.value.fix
    return caught.value.what


def test_what_is_refused(runs: list[Path], tmp_path: Path) -> None:
    a, b, c = map(str, runs)
    assert "no run is given" in refusal()
    assert "no run folder" in refusal(a, str(tmp_path / "nowhere"))
    assert "given twice" in refusal(a, f"{tmp_path}/styled/../plain-seed0")
    assert "not evaluated at 0.3 kimg: plain-seed1 at 0 0.1 0.2; styled at 0 0.104 0.2" in refusal(
        a, b, c, "--at", "0.3"
    )
    assert "not all are 0 or more" in refusal(a, "--at", "nan")
    assert "no evaluation within 1 s" in refusal(str(make(tmp_path / "late", RESIDUAL, {10: 1.0})), "--seconds", "1")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    assert "is there already" in refusal(a, b, "--out", str(tmp_path / "full"))
    apart = str(make(tmp_path / "apart", RESIDUAL, {150: 1.0}))
    assert "no number of images at which all runs were evaluated" in refusal(a, apart)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("", "no evaluation yet"),
        ('{"nimg": 3, "kl/real": 1}\n', "no evaluation yet"),
        ('{"nimg": 3, "eval/psnr": "good"}\n', "cannot read"),
        ('{"nimg": 3, "eval/psnr": [1]}\n', "cannot read"),
        ('{"eval/psnr": 3}\n', "cannot read"),
        ('{"nimg": Infinity, "eval/psnr": 3}\n', "cannot read"),
        ("\udcff", "cannot read"),
        ('{"nimg": 3, "eval/psnr": 1}\n', "time/train_s is not in the metrics"),
    ],
)
def test_bad_metrics(content: str, complaint: str, runs: list[Path]) -> None:
    (runs[0] / "metrics.jsonl").write_bytes(content.encode("utf-8", "surrogateescape"))
    assert complaint in refusal(str(runs[0]))


def test_a_broken_picture_is_named(runs: list[Path], tmp_path: Path) -> None:
    path = runs[0] / "samples" / "nimg-000001000.png"
    path.write_bytes(path.read_bytes()[:60])
    assert "nimg-000001000.png" in refusal(str(runs[0]), "--out", str(tmp_path / "out"))


def test_without_pictures_there_is_no_sheet(runs: list[Path], tmp_path: Path) -> None:
    for path in (runs[2] / "samples").iterdir():
        path.unlink()
    main(["compare", str(runs[2]), "--out", str(tmp_path / "out")])
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["compare.json", "compare.md"]
