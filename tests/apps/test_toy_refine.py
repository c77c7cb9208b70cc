"""The search around a choice: as many changes for every objective, judged as whole runs, added to what is known."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from sivae_dist.apps import toy, toy_refine, toy_tune
from sivae_dist.apps.toy_refine import near
from sivae_dist.apps.toy_tune import Trial
from sivae_dist.cli import main
from sivae_dist.engine.config import to_yaml
from sivae_dist.errors import UserError

PLACES = (("rings",), ("vae", "soft_introvae"))
OWN = {
    ("rings", "vae"): {"beta_kl": 0.012},
    ("rings", "soft_introvae"): {"beta_rec": 0.2, "beta_kl": 0.5, "beta_neg": 1.0},
}


def plan(out: Path, changes: int = 4) -> list[Trial]:
    return toy_refine.plan(out, *PLACES, changes=changes, seed=3, around=OWN, stop_after=20_000)


def test_one_weight_is_changed_at_a_time() -> None:
    own = OWN["rings", "soft_introvae"]
    assert [near("soft_introvae", own, number) for number in range(8)] == [
        own,
        {**own, "beta_rec": 0.1},
        {**own, "beta_kl": 0.25},
        {**own, "beta_neg": 0.5},
        {**own, "beta_rec": 0.4},
        {**own, "beta_kl": 1.0},
        {**own, "beta_neg": 2.0},
        {**own, "beta_rec": 0.141},
    ]
    values = [near("vae", OWN["rings", "vae"], number)["beta_kl"] for number in range(7)]
    assert values == [0.012, 0.006, 0.024, 0.00849, 0.017, 0.003, 0.048]


@pytest.mark.parametrize("objective", toy.OBJECTIVES)
def test_all_that_may_be_asked_for_are_other_settings(objective: toy.ObjectiveName) -> None:
    recipe = toy_tune.drawn("rings", objective, 0)
    tried = [tuple(near(objective, recipe, number).items()) for number in range(toy_refine.MOST + 1)]
    assert len(set(tried)) == len(tried)


def test_every_objective_gets_as_many_whole_runs(tmp_path: Path) -> None:
    found = plan(tmp_path)
    assert [(t.number, t.job.objective) for t in found] == [(n, o) for n in range(5) for o in PLACES[1]]
    assert {(t.job.config.train.total_nimg, t.job.seed) for t in found} == {(20_000 * 512, 3)}
    assert {t.job.run.root.parent for t in found} == {tmp_path / "refine"}
    for trial in found:
        assert trial.settings == near(trial.job.objective, OWN[toy_tune.place_of(trial)], trial.number)
        assert {knob: getattr(trial.job.config.objective, knob) for knob in trial.settings} == trial.settings
    recipes = toy_refine.plan(tmp_path / "b", *PLACES, changes=1, seed=0)
    for trial in recipes[:2]:
        assert trial.job.config.objective == toy.recipe("rings", trial.job.objective).objective


def test_the_best_is_settled_and_added_to_what_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = {("vae", number): 0.3 for number in range(5)} | {("soft_introvae", n): 0.2 for n in range(5)}
    values |= {("soft_introvae", 2): 0.1, ("vae", 3): math.inf}
    monkeypatch.setattr(toy_refine, "judged", lambda trial: values[trial.job.objective, trial.number])
    monkeypatch.setattr(toy_tune, "judged", toy_refine.judged)
    before = tmp_path / "before.json"
    known = {"chosen": {"8gaussians-vae": {"beta_kl": 1.0}, "rings-vae": OWN["rings", "vae"]}, "trials": [1]}
    before.write_text(json.dumps(known))
    found = plan(tmp_path)
    for trial in found:
        trial.job.run.root.mkdir(parents=True)
        trial.job.run.config.write_text(to_yaml(trial.job.config))

    chosen = toy_refine.write(found, tmp_path / "tune.json", before)
    assert chosen == {**OWN, ("rings", "soft_introvae"): {"beta_rec": 0.2, "beta_kl": 0.25, "beta_neg": 1.0}}
    assert toy_tune.read(tmp_path / "tune.json", *PLACES) == chosen
    written = json.loads((tmp_path / "tune.json").read_text())
    assert written["chosen"]["8gaussians-vae"] == {"beta_kl": 1.0} and written["trials"] == [1]
    (round_,) = written["refined"]
    assert (round_["points"], round_["seed"], len(round_["trials"])) == (20_000 * 512, 3, 10)
    assert [row["hist_jsd"] for row in round_["trials"] if row["objective"] == "vae"] == [0.3, 0.3, 0.3, None, 0.3]
    toy_refine.write(found, tmp_path / "tune.json", tmp_path / "tune.json")  # from there once more
    assert len(json.loads((tmp_path / "tune.json").read_text())["refined"]) == 2
    told = toy_refine.table(found)
    assert "| rings | soft_introvae | 0.2000 | beta_rec 0.1: 0.2000, beta_kl 0.25: 0.1000, " in told
    assert "| rings | vae | 0.3000 | beta_kl 0.006: 0.3000, beta_kl 0.024: 0.3000, beta_kl 0.00849: inf, " in told

    toy_tune.settle(tmp_path, found, toy_refine.FOLDER)
    compared = toy.plan(tmp_path, *PLACES, seeds=[3], stop_after=20_000, tuned=chosen)  # refuses other settings
    assert all(job.run.config.exists() for job in compared)
    names = {path.name for path in (tmp_path / "refine").iterdir()}
    assert names == {t.job.name for t in found} - {"rings-vae-seed3-trial0", "rings-soft_introvae-seed3-trial2"}
    assert all(trial.job.run.config.exists() for trial in plan(tmp_path)), "again: each is found where it now is"

    values["soft_introvae", 4] = 0.05
    toy_tune.settle(tmp_path, plan(tmp_path), toy_refine.FOLDER)
    assert {path.name for path in (tmp_path / "refine").iterdir()} == {t.job.name for t in found} - {
        "rings-vae-seed3-trial0",
        "rings-soft_introvae-seed3-trial4",
    }
    with pytest.raises(UserError, match="settings that are not in the final"):
        plan(tmp_path, changes=3)


@pytest.mark.slow
@pytest.mark.dist
def test_the_command_refines_and_then_trains(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--density", "rings", "--objective", "vae", "--seeds", "2", "--iterations", "20", "--jobs", "2"]
    command = ["toy", *options, "--refine", "2", "--out", str(tmp_path)]
    main(command)
    said = capsys.readouterr().out
    assert "with one weight changed" in said and "grid NLL" in said
    (chosen,) = toy_tune.read(tmp_path / "tune.json", ("rings",), ("vae",)).values()
    assert chosen["beta_kl"] in {0.1, 0.2, 0.4}
    stored = json.loads((tmp_path / "toy.json").read_text())
    assert stored["settings"]["rings-vae"]["objective"]["beta_kl"] == chosen["beta_kl"]
    assert [bool(row.get("chosen_by_its_result")) for row in stored["runs"]] == [True, False]
    text = (tmp_path / "tune.json").read_text()
    main(command)  # nothing is left to do
    assert (tmp_path / "tune.json").read_text() == text
