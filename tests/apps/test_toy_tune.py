"""The search for settings of the 2-D experiments: equal for all objectives, repeatable, judged on other points."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from sivae_dist.apps import toy, toy_report, toy_tune
from sivae_dist.apps.toy_tune import KNOBS, Trial
from sivae_dist.cli import main
from sivae_dist.data.toy2d import Toy2dStream
from sivae_dist.engine.config import to_yaml
from sivae_dist.errors import UserError


def trials(out: Path, count: int = 3) -> list[Trial]:
    return toy_tune.plan(out, ("rings",), ("vae", "introvae"), trials=count, iterations=300)


def test_every_objective_gets_as_many_trials(tmp_path: Path) -> None:
    found = toy_tune.plan(tmp_path, toy.DENSITIES, toy.OBJECTIVES, trials=3, iterations=300)
    assert len(found) == 3 * 4 * 3 == len({trial.job.run.root for trial in found})
    assert [trial.number for trial in found] == [0] * 12 + [1] * 12 + [2] * 12
    for trial in found:
        recipe = toy.recipe(trial.job.density, trial.job.objective).objective
        own = {knob: getattr(recipe, knob) for knob in KNOBS[trial.job.objective]}
        assert (trial.settings == own) == (trial.number == 0)
        for knob, (low, high) in KNOBS[trial.job.objective].items():
            assert 0.99 * low <= trial.settings[knob] / own[knob] <= 1.01 * high
        config = trial.job.config
        assert {knob: getattr(config.objective, knob) for knob in own} == trial.settings
        assert (config.train.total_nimg, config.train.seed) == (300 * 512, toy_tune.SEED)
    assert [t.settings for t in found] == [
        t.settings for t in toy_tune.plan(tmp_path, toy.DENSITIES, toy.OBJECTIVES, trials=3, iterations=300)
    ]
    ratios = [t.settings["beta_kl"] / found[t.number].settings["beta_kl"] for t in found if t.number == 1]
    assert len(set(ratios)) > 6  # not one draw for all


@pytest.mark.parametrize("density", toy.DENSITIES)
@pytest.mark.parametrize("objective", toy.OBJECTIVES)
def test_few_trials_leave_no_large_gap(density: toy.DensityName, objective: toy.ObjectiveName) -> None:
    """Of every weight, and of every ratio of two: in seven trials both halves of the range are tried."""
    recipe, ranges = toy_tune.drawn(density, objective, 0), KNOBS[objective]

    def place(knob: str, value: float) -> float:
        low, high = (math.log(end) for end in ranges[knob])
        return 2 * (math.log(value / recipe[knob]) - low) / (high - low) - 1

    logs = [
        {knob: place(knob, value) for knob, value in trial.items()}
        for trial in (toy_tune.drawn(density, objective, number) for number in range(1, 8))
    ]
    for knob in recipe:
        places = [-1.0, *sorted(trial[knob] for trial in logs), 1.0]
        assert max(b - a for a, b in itertools.pairwise(places)) < 0.8  # of a range of 2
        # In the four trials besides the recipe that --tune 5 has, too, no much larger part of the range is left out.
        few = [-1.0, *sorted(trial[knob] for trial in logs[:4]), 1.0]
        assert max(b - a for a, b in itertools.pairwise(few)) < (0.9 if len(recipe) == 1 else 1.2)
    for one, other in itertools.combinations(recipe, 2):
        ratios = [trial[one] - trial[other] for trial in logs]
        assert min(ratios) < -0.3
        assert max(ratios) > 0.3


def end(job: toy.Job) -> None:
    """What a run that was trained to its end leaves."""
    job.run.summary.write_text(json.dumps({"finished": True, "nimg": job.config.train.total_nimg}))


def judge(monkeypatch: pytest.MonkeyPatch, values: dict[tuple[str, int], float]) -> None:
    monkeypatch.setattr(toy_tune, "judged", lambda trial: values[trial.job.objective, trial.number])


def test_the_best_is_chosen_written_and_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = {("vae", 0): 0.5, ("vae", 1): 0.2, ("vae", 2): 0.2}
    values |= {("introvae", 0): math.inf, ("introvae", 1): math.inf, ("introvae", 2): 0.6}
    judge(monkeypatch, values)
    found = trials(tmp_path)
    chosen = toy_tune.write(found, tmp_path / "tune.json")
    expected = {("rings", "vae"): found[2].settings, ("rings", "introvae"): found[5].settings}
    assert chosen == expected == toy_tune.read(tmp_path / "tune.json", ("rings",), ("vae", "introvae"))
    rows = json.loads((tmp_path / "tune.json").read_text())["trials"]
    assert [row["hist_jsd"] for row in rows] == [0.5, None, 0.2, None, 0.2, 0.6]
    assert "| rings | introvae | inf | inf | 0.6000 |" in toy_tune.table(found)
    (job,) = toy.plan(tmp_path / "main", ("rings",), ("introvae",), seeds=[0], tuned=chosen)
    recipe = toy.recipe("rings", "introvae").objective
    assert job.config.objective.margin == found[5].settings["margin"] != recipe.margin  # type: ignore[attr-defined]
    assert job.config.objective.vae_warmup_kimg == recipe.vae_warmup_kimg  # type: ignore[attr-defined]
    assert job.config.train.total_nimg == 30_000 * 512


def whole(out: Path, found: list[Trial], count: int = 2) -> list[Trial]:
    return toy_tune.finals(out, found, count=count, seed=5, stop_after=20_000)


def test_the_best_of_each_are_trained_to_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many of every objective, best ones first; what wins in the end stands where compared models do."""
    values = {("vae", 0): 0.3, ("vae", 1): 0.2, ("vae", 2): 0.1}
    values |= {("introvae", 0): 0.5, ("introvae", 1): math.inf, ("introvae", 2): 0.6}
    judge(monkeypatch, values)
    found = trials(tmp_path / "tune")
    best = whole(tmp_path, found)
    assert [(t.job.objective, t.number) for t in best] == [("vae", 2), ("introvae", 0), ("vae", 1), ("introvae", 2)]
    assert {(t.job.config.train.total_nimg, t.job.seed) for t in best} == {(20_000 * 512, 5)}
    assert [t.job.name for t in best][::3] == ["rings-vae-seed5-trial2", "rings-introvae-seed5-trial2"]
    for trial in best:
        trial.job.run.root.mkdir(parents=True)
        trial.job.run.config.write_text(to_yaml(trial.job.config))
    judge(monkeypatch, {**values, ("vae", 1): 0.05, ("introvae", 0): 0.4})  # of the whole runs
    chosen = toy_tune.write(found, tmp_path / "tune.json", best)
    expected = {("rings", "vae"): best[2].settings, ("rings", "introvae"): best[1].settings}
    assert chosen == expected == toy_tune.read(tmp_path / "tune.json", ("rings",), ("vae", "introvae"))
    written = json.loads((tmp_path / "tune.json").read_text())
    assert [row["trial"] for row in written["finals"]["trials"]] == [2, 0, 1, 2]
    assert (written["points"], written["finals"]["points"], written["finals"]["seed"]) == (300 * 512, 20_000 * 512, 5)
    assert "| 2: 0.1000, 1: 0.0500 | beta_kl" in toy_tune.table(found, best)
    toy_tune.settle(tmp_path, best)
    compared = toy.plan(
        tmp_path, ("rings",), ("vae", "introvae"), seeds=[5], stop_after=20_000, tuned=chosen
    )  # which refuses other settings
    assert all(job.run.config.exists() for job in compared)

    # Again: each is found where it now is, also when another one wins.
    judge(monkeypatch, values)
    again = whole(tmp_path, found)
    assert all(trial.job.run.config.exists() for trial in again)
    toy_tune.settle(tmp_path, again)
    assert not toy.holds(compared[0].run, compared[0].config)
    assert {p.name for p in (tmp_path / "tune").iterdir()} == {"rings-vae-seed5-trial1", "rings-introvae-seed5-trial2"}

    judge(monkeypatch, {**values, ("vae", 1): 0.9, ("vae", 2): 0.8})  # what is in the way now is in no final of two
    with pytest.raises(UserError, match="settings that are not in the final"):
        whole(tmp_path, found, count=1)


GOOD = {"beta_kl": 0.5}


@pytest.mark.parametrize(
    "chosen",
    [
        None,
        [],
        {},
        {"rings-vae": 3},
        {"rings-vae": {"beta_rec": 1.0}},
        {"rings-vae": {}},
        {"rings-vae": {**GOOD, "seed": 3}},
        {"rings-vae": {**GOOD, "beta_kl": "0.5"}},
        {"rings-vae": {**GOOD, "beta_kl": -1.0}},
        {"rings-vae": {**GOOD, "beta_kl": True}},
        {"rings-vae": {**GOOD, "beta_kl": math.nan}},
    ],
)
def test_other_files_are_refused(tmp_path: Path, chosen: Any) -> None:
    path = tmp_path / "tune.json"
    path.write_text(json.dumps({"chosen": {"rings-vae": GOOD}}))
    assert toy_tune.read(path, ("rings",), ("vae",)) == {("rings", "vae"): GOOD}
    path.write_text(json.dumps({"chosen": chosen}))
    with pytest.raises(UserError, match=r"no settings|expected positive beta_kl"):
        toy_tune.read(path, ("rings",), ("vae",))
    with pytest.raises(UserError, match="no settings"):
        toy_tune.read(tmp_path / "none.json", ("rings",), ("vae",))


def test_wrong_options_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for options, told in (
        (["--tune", "1"], "--tune is 1"),
        (["--tune", "2", "--finalists", "0"], "--finalists is 0"),
        (["--tune", "2", "--tuned", "x.json"], "--tune and --tuned"),
        (["--tune", "2", "--refine", "6"], "--tune and --refine"),
        (["--refine", "0"], "--refine is 0"),
        (["--refine", "7"], "--refine is 7"),
        (["--tuned", str(tmp_path / "x.json")], "x.json holds no settings"),
    ):
        with pytest.raises(SystemExit):
            main(["toy", "--all", "--out", str(tmp_path), *options])
        assert told in capsys.readouterr().err


class _Copies:
    """A model whose samples are the points that `judged` should and should not compare with."""

    def __init__(self, points: torch.Tensor) -> None:
        self.points = points

    def sample(self, count: int, seed: int) -> torch.Tensor:
        assert len(self.points) == count
        return self.points


def test_trials_are_judged_by_points_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toy_report, "SAMPLES", 500)
    points = Toy2dStream("rings").held_out(1500, batch=1500)[0].data.split(500)
    values = []
    for trial, copied in zip(trials(tmp_path), [*points, points[0] * math.nan], strict=False):
        trial.job.run.root.mkdir(parents=True)
        assert toy_tune.judged(trial) == math.inf  # not trained to its end, and not remembered
        end(trial.job)
        monkeypatch.setattr(toy_tune, "load", lambda *_, x=copied, **__: _Copies(x))
        values.append(toy_tune.judged(trial))
        monkeypatch.setattr(toy_tune, "load", None)
        assert toy_tune.judged(trial) == values[-1]  # kept
    assert values[2] == 0.0 < min(values[0], values[1])
    assert values[3] == math.inf


@pytest.mark.slow
@pytest.mark.dist
def test_the_command_tunes_and_then_trains(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--density", "rings", "--objective", "vae", "--seeds", "1", "--iterations", "20", "--jobs", "2"]
    main(["toy", *options, "--tune", "2", "--tune-iterations", "20", "--out", str(tmp_path)])
    said = capsys.readouterr().out
    assert "2 settings each" in said and "grid NLL" in said
    tried = json.loads((tmp_path / "tune.json").read_text())
    assert len(tried["trials"]) == len(tried["finals"]["trials"]) == 2
    found = toy_tune.read(tmp_path / "tune.json", ("rings",), ("vae",))["rings", "vae"]
    stored = json.loads((tmp_path / "toy.json").read_text())["settings"]["rings-vae"]["objective"]
    assert {knob: stored[knob] for knob in found} == found
    main(["toy", *options, "--tuned", str(tmp_path / "tune.json"), "--out", str(tmp_path)])  # nothing is left to do
