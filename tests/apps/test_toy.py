"""The 2-D experiments: plan, training in processes of their own, going on, table and figures."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from sivae_dist.apps import toy, toy_report, toy_tune
from sivae_dist.apps.toy import Job
from sivae_dist.cli import main
from sivae_dist.distributed import launcher
from sivae_dist.engine.config import from_dict, to_dict, to_yaml
from sivae_dist.engine.guard import GuardConfig
from sivae_dist.engine.run_folder import RunFolder
from sivae_dist.errors import UserError
from sivae_dist.evaluation import toy2d
from sivae_dist.models.mlp import MlpConfig


def small(jobs: list[Job]) -> list[Job]:
    """The same with small networks, small batches and seldom a report."""
    return [
        dataclasses.replace(
            job,
            config=dataclasses.replace(
                job.config,
                model=MlpConfig(width=8, hidden_layers=1),
                train=dataclasses.replace(job.config.train, batch=32, kimg=0.64),
                eval=dataclasses.replace(job.config.eval, images=64),
            ),
        )
        for job in jobs
    ]


def test_a_shorter_run_is_the_same_in_small(tmp_path: Path) -> None:
    whole, short = (
        toy.plan(tmp_path, ("rings",), ("soft_introvae",), seeds=[4], iterations=n)[0].config for n in (None, 3000)
    )
    assert whole.train.total_nimg == 30_000 * 512
    assert short.train.total_nimg == 3000 * 512
    assert short.train.seed == whole.train.seed == 4
    for config, factor in ((whole, 1.0), (short, 0.1)):
        phases = [[p.name for p in config.objective.build((2,)).phases(n)] for n in (0, round(2000 * 512 * factor))]
        assert phases == [["joint"], ["encoder", "decoder"]]
        assert [config.optim.factor(round(n * 512 * factor)) for n in (9999, 10_000, 15_000)] == pytest.approx(
            [1, 0.1, 0.01]
        )


def test_a_run_that_stops_early_is_the_beginning_of_the_whole_one(tmp_path: Path) -> None:
    whole, cut = (
        toy.plan(tmp_path, ("rings",), ("soft_introvae",), seeds=[0], stop_after=n)[0].config for n in (None, 20_000)
    )
    assert cut.train.total_nimg == 20_000 * 512
    assert dataclasses.replace(cut, train=whole.train) == whole


def test_precision_is_the_commands_not_the_environments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (job,) = toy.plan(tmp_path, ("rings",), ("vae",), seeds=[0])
    (half,) = toy.plan(tmp_path, ("rings",), ("vae",), seeds=[0], precision="bf16")
    assert half.config.precision.dtype == "bf16"
    assert dataclasses.replace(half.config, precision=job.config.precision) == job.config
    assert toy_report.settings([half]) != toy_report.settings([job])  # so their rows share no table
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    given: list[dict[str, str]] = []
    monkeypatch.setattr(toy.subprocess, "Popen", lambda *_, env, **__: given.append(env))  # type: ignore[attr-defined]
    running = toy._start(job, tmp_path)
    running.log.close()
    assert given[0]["ACCELERATE_MIXED_PRECISION"] == "no"
    assert given[0][launcher.OWN] == "1"  # it saves and ends when the command is killed


def test_the_twelve_models_share_what_they_should(tmp_path: Path) -> None:
    jobs = toy.plan(tmp_path, toy.DENSITIES, toy.OBJECTIVES, seeds=range(2))
    assert len({job.name for job in jobs}) == len(jobs) == 24
    assert [job.seed for job in jobs] == [0] * 12 + [1] * 12
    for density in toy.DENSITIES:
        mine = [job.config for job in jobs if job.density == density and job.seed == 0]
        assert {config.data.density for config in mine} == {density}  # type: ignore[attr-defined]
        same = {
            json.dumps([dataclasses.asdict(getattr(c, part)) for part in ("model", "train", "optim", "ema", "eval")])
            for c in mine
        }
        assert len(same) == 1
        betas = {(c.objective.beta_rec, c.objective.beta_kl) for c in mine}  # type: ignore[attr-defined]
        assert len(betas) == 1


@pytest.mark.parametrize("iterations", [None, 150, 777])
def test_a_folder_is_known_again(tmp_path: Path, iterations: int | None) -> None:
    """By the settings as the trainer writes them, which is not letter by letter what it was given (1024, 1024.0)."""
    (job,) = toy.plan(tmp_path, ("rings",), ("soft_introvae",), seeds=[0], iterations=iterations)
    job.run.root.mkdir(parents=True)
    job.run.config.write_text(to_yaml(from_dict(to_dict(job.config), "test")))
    assert toy.plan(tmp_path, ("rings",), ("soft_introvae",), seeds=[0], iterations=iterations)[0].config == job.config
    with pytest.raises(UserError, match="other settings"):
        toy.plan(tmp_path, ("rings",), ("soft_introvae",), seeds=[0], iterations=151)


@pytest.mark.slow
@pytest.mark.dist
def test_trains_goes_on_and_reports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"PUBLISHED_GRID": 24, "PUBLISHED_POINTS": 300, "PUBLISHED_SAMPLES": 500, "SAMPLES": 1000, "SHOWN": 100}
    for name, value in sizes.items():
        monkeypatch.setattr(toy_report, name, value)
    monkeypatch.setattr(toy_report, "_OTHER", 1000)
    out = tmp_path / "toy"
    jobs = small(toy.plan(out, ("rings",), ("vae", "soft_introvae"), seeds=[0]))
    toy.train(jobs, out, at_once=2, progress=False)
    assert all(job.finished() and job.reached() == 640 for job in jobs)
    table = toy_report.write(jobs, out)
    assert (out / "toy.md").read_text() == table + "\n"
    rows = json.loads((out / "toy.json").read_text())["runs"]
    elsewhere = tmp_path / "elsewhere.json"
    (out / "toy.json").rename(elsewhere)
    assert toy_report.write(jobs[:1], tmp_path, [elsewhere]).startswith("1 seed(s)")  # of the other objective none
    assert toy_report.write(jobs, out, [elsewhere]) == table
    assert [row["objective"] for row in rows] == ["vae", "soft_introvae"]
    for row in rows:
        assert all(math.isfinite(row[key]) for key in toy_report.MEASURES)
        assert {"loss/joint", "rec/real", "kl/real"} == set(row["losses"])
        assert 0 < row["hist_jsd_floor"] < row["hist_jsd"] <= math.log(2)
    for name in ("samples", "density"):
        with Image.open(out / f"{name}.png") as picture:
            assert picture.width > 3 * 256

    before = {job.name: job.run.metrics.stat().st_mtime_ns for job in jobs}
    toy.train(jobs, out, at_once=1, progress=False)  # nothing is left to do
    assert before == {job.name: job.run.metrics.stat().st_mtime_ns for job in jobs}
    with pytest.raises(UserError, match="other settings"):
        toy.plan(out, ("rings",), ("vae",), seeds=[0])


@pytest.mark.slow
@pytest.mark.dist
def test_a_run_that_fails_is_told(tmp_path: Path) -> None:
    (job,) = small(toy.plan(tmp_path, ("rings",), ("vae",), seeds=[0]))
    job.run.root.write_text("in the way")
    with pytest.raises(UserError, match="1 of 1 runs did not finish") as told:
        toy.train([job], tmp_path, at_once=1, progress=False)
    assert "rings-vae-seed0.log" in told.value.fix


@pytest.mark.slow
@pytest.mark.dist
def test_a_run_that_diverges_is_a_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not trained again, and the table of the others is made, with it counted as failed."""
    monkeypatch.setattr(toy_report, "measure", lambda *_: {"hist_kl": 1.0, "grid_nll": 2.0, "hist_kl_floor": 0.5})
    monkeypatch.setattr(toy_report, "figures", lambda *_: None)
    good, bad = small(toy.plan(tmp_path, ("rings",), ("vae",), seeds=[0, 1]))
    player = dataclasses.replace(bad.config.optim.encoder, lr=1e30)
    config = dataclasses.replace(
        bad.config, optim=dataclasses.replace(bad.config.optim, encoder=player, decoder=player)
    )
    config = dataclasses.replace(config, guard=GuardConfig(patience=1, max_rollbacks=1))
    bad = dataclasses.replace(bad, config=config)
    assert toy.train([good, bad], tmp_path, at_once=2, progress=False) == [bad]
    table = toy_report.write([good, bad], tmp_path)
    assert "| rings | 1.000 (1 of 2 failed) | 0.500 |" in table
    row = json.loads((tmp_path / "toy.json").read_text())["runs"][1]
    assert row["given_up"] and "hist_kl" not in row
    before = (tmp_path / "logs/rings-vae-seed1.log").read_bytes()
    assert toy.train([good, bad], tmp_path, at_once=2, progress=False) == [bad]
    assert (tmp_path / "logs/rings-vae-seed1.log").read_bytes() == before


def test_losses_are_those_of_the_last_report(job: Job) -> None:
    """None of a phase that is long past, and all that there are: the terms of every part of the objective."""
    job.run.root.mkdir(parents=True)
    rows = [
        {"nimg": 1, "loss/joint": 3.0, "kl/real": 2.0},
        {
            "nimg": 2,
            "loss/encoder": 1.0,
            "exp_elbo/fake": 0.5,
            "encoder/rec_fake": 0.2,
            "lr/encoder": 1.0,
            "mem/x": 1.0,
        },
        {"nimg": 2, "eval/psnr": 4.0, "time/train_s": 5.0},
    ]
    job.run.metrics.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (row,) = toy_report.rows_of([job])
    assert row["losses"] == {"loss/encoder": 1.0, "exp_elbo/fake": 0.5, "encoder/rec_fake": 0.2}
    assert row["given_up"] and row["nimg"] == 2


class _Model:
    """What `measure` asks of a trained model: these points are its samples."""

    def __init__(self, points: torch.Tensor) -> None:
        self.points, self.model = points, MlpConfig(width=8, hidden_layers=1).build()

    def sample(self, count: int, seed: int) -> torch.Tensor:
        return self.points[:count]


def test_what_lies_outside_counts(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that draws nothing in the square is the worst one in nats, not one without a value."""
    sizes = {"PUBLISHED_GRID": 24, "PUBLISHED_POINTS": 300, "PUBLISHED_SAMPLES": 50, "SAMPLES": 1000, "_OTHER": 1000}
    for name, value in sizes.items():
        monkeypatch.setattr(toy_report, name, value)
    outside = torch.full((1000, 2), 99.0)
    few = outside.clone()
    few[500:] = 0  # inside, but not among the first
    for points, share in ((outside, 1.0), (few, 0.5)):
        found = toy_report.measure(_Model(points), job)  # type: ignore[arg-type]
        assert found["outside"] == share
        assert found["hist_jsd"] > 0.9 * math.log(2) * share and math.isfinite(found["hist_kl"])
        assert "published_kl" not in found
    assert "hist_kl" not in toy_report.measure(_Model(outside * math.nan), job)  # type: ignore[arg-type]


def test_published_measures_are_means_over_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toy_report, "PUBLISHED_SAMPLES", 200)
    real, fake = torch.rand(2, 600, 2, generator=torch.Generator().manual_seed(0)).mul(2).sub(1)
    found = toy_report.published(real, fake, 1.0)
    each = [toy2d.published_jsd(real[i : i + 200], fake[i : i + 200], 1.0) for i in (0, 200, 400)]
    assert found["published_jsd"] == pytest.approx(sum(each) / 3, rel=1e-12)
    assert found["published_jsd_of_one_draw"] == pytest.approx(statistics.stdev(each), rel=1e-12) != 0
    fake[200:400] = 99.0
    assert toy_report.published(real, fake, 1.0) == {}


def test_a_model_is_measured_once(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """And again where it has changed, or what was kept was measured otherwise."""
    calls = []
    model = SimpleNamespace(nimg=512)
    monkeypatch.setattr(toy_report, "load", lambda *_, **__: model)

    def measure(*_: object) -> dict[str, float]:
        calls.append(model.nimg)
        return {"published_draws": 20}

    monkeypatch.setattr(toy_report, "measure", measure)
    job.run.root.mkdir(parents=True)
    job.run.metrics.touch()
    assert toy_report.measured(job) == toy_report.measured(job)
    assert calls == [512]
    model.nimg = 1024
    assert toy_report.measured(job)["nimg"] == 1024
    (job.run.root / "toy2d.json").write_text(json.dumps({"nimg": 1024, "hist_kl": 1.0}))
    assert "hist_kl" not in toy_report.measured(job)
    assert calls == [512, 1024, 1024]


@pytest.fixture
def told(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs the command line with wrong options; what it says."""

    def run(*arguments: str) -> str:
        with pytest.raises(SystemExit):
            main(list(arguments))
        return capsys.readouterr().err

    return run


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return toy.plan(tmp_path, ("rings",), ("vae",), seeds=[0])[0]


@pytest.mark.parametrize(
    ("text", "reached"), [("", 0), ('{"nimg": 7}\n{"nimg": 512, "x": 1}\n', 512), ('{"nimg": 5}\n{"nim', 0)]
)
def test_how_far_a_run_came(job: Job, text: str, reached: int) -> None:
    job.run.root.mkdir(parents=True)
    assert job.reached() == 0
    job.run.metrics.write_text(text)
    assert job.reached() == reached
    assert not job.finished()


def row(objective: str, seed: int, **values: float) -> dict[str, Any]:
    known = {"nimg": 512, "hist_kl_floor": 0.01, "hist_jsd_floor": 0.001, "grid_nll": 1.0, "published_draws": 20}
    return {"density": "rings", "objective": objective, "seed": seed, **known, **values}


def test_table_shows_spread_and_failures() -> None:
    rows = [row("vae", 0, hist_kl=1.0), row("introvae", 0), row("vae", 1, hist_kl=2.0), row("introvae", 1, hist_kl=3.0)]
    text = toy_report.table(rows)
    assert text.startswith("2 seed(s), 512 points")
    assert "| rings | 1.500 ± 0.707 | 3.000 (1 of 2 failed) | 0.010 |" in text
    assert "| rings | - | - |" in text
    assert toy_report.table(rows[:-1]).startswith("1 to 2 seeds")
    assert "chosen" not in text
    rows[2]["chosen_by_its_result"] = True
    assert "Models of seed 1 were chosen among the finalists" in toy_report.table(rows)


def test_rows_of_models_trained_elsewhere(tmp_path: Path, job: Job) -> None:
    path = tmp_path / "theirs.json"

    def given(rows: list[dict[str, Any]], **changes: Any) -> list[dict[str, Any]]:
        path.write_text(json.dumps({"runs": rows, "settings": toy_report.settings([job]) | changes}))
        return toy_report.rows_from(path, [job])

    others = [row("vae", 1), row("vae", 2)]
    assert given([row("vae", 0), *others, row("introvae", 1)]) == others  # the job's own, and what is not asked for
    with pytest.raises(UserError, match="rings-vae with other settings"):
        given(others, **{"rings-vae": {"train": {"kimg": 1}}})
    for wrong in ("", "[]", "{}", '{"runs": 3, "settings": {}}', '{"runs": [{}], "settings": {}}'):
        path.write_text(wrong)
        with pytest.raises(UserError, match="no results of the 2-D experiments"):
            toy_report.rows_from(path, [job])
    with pytest.raises(UserError, match="no number"):
        given([row("vae", 1) | {"hist_kl": "0"}])
    with pytest.raises(UserError, match="another version, which measured otherwise"):
        given([row("vae", 1) | {"published_draws": 1}])
    assert given([*others, row("introvae", 1, published_draws=1)]) == others  # what is not asked for may be anything
    given_up = {"density": "rings", "objective": "vae", "seed": 1, "nimg": 3, "given_up": True}
    assert given([given_up]) == [given_up]  # not measured at all
    with pytest.raises(UserError, match="no results"):
        toy_report.rows_from(tmp_path / "none.json", [job])


def test_wrong_options_are_told(tmp_path: Path, told: Callable[..., str]) -> None:
    assert "nothing is chosen" in told("toy")
    assert "--seeds is 0" in told("toy", "--all", "--seeds", "0")
    assert "--iterations is 0" in told("toy", "--all", "--iterations", "0", "--out", str(tmp_path))
    for wrong in ("0", "30001"):
        text = told("toy", "--all", "--stop-after", wrong, "--out", str(tmp_path))
        assert f"--stop-after is {wrong}, expected 1 to the 30000 iterations" in text
    assert "--jobs is 0" in told("toy", "--density", "rings", "--jobs", "0", "--out", str(tmp_path))


def test_a_run_folder_of_a_job_is_an_ordinary_one(job: Job) -> None:
    assert isinstance(job.run, RunFolder)
    assert job.run.root.name == "rings-vae-seed0"


@pytest.mark.parametrize(
    ("rows", "tuned", "options"),
    [
        ("toy2d.json", None, {}),
        ("toy2d_tuned.json", "toy2d_tune.json", {"stop_after": 20_000}),
        ("toy2d_refined.json", "toy2d_refine.json", {"stop_after": 20_000}),
    ],
)
def test_the_rows_in_the_docs_fit_the_recipes(
    tmp_path: Path, rows: str, tuned: str | None, options: dict[str, int]
) -> None:
    """So that `--also` takes them all, and no recipe is changed without training anew."""
    docs = Path(__file__).parents[2] / "docs"
    told = json.loads((docs / rows).read_text())["runs"]
    densities = sorted({row["density"] for row in told})
    settings = toy_tune.read(docs / tuned, densities, toy.OBJECTIVES) if tuned is not None else None
    jobs = toy.plan(tmp_path, densities, toy.OBJECTIVES, seeds=[10_000], tuned=settings, **options)
    assert toy_report.rows_from(docs / rows, jobs) == told != []
