"""The same search for good settings for every objective of the 2-D experiments, so that none has had more care.

For each density and objective: N trials, of which the first has the recipe's settings and the others spread the
objective's own weights evenly, on a logarithmic scale, within a range around the recipe's (`KNOBS`). (Random draws
leave gaps: seven of them had no VAE for 8 Gaussians whose code carries anything.) Trials are shortened runs with a seed
that no compared model has, judged by the Jensen-Shannon divergence to held-out points that the comparison does not use.
A trial whose numbers stop being finite counts as the worst.

Settings that learn fast need not be the best in the end, so the best two trials of each are then trained as long as the
compared models, and judged again. The better one's settings are those of the compared models; it is the first of them.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from sivae_dist.apps import toy, toy_report
from sivae_dist.apps.toy import DensityName, Job, ObjectiveName, PrecisionName, Settings
from sivae_dist.counters import key, uniform
from sivae_dist.data.toy2d import EXTENT, Toy2dStream
from sivae_dist.engine.load import load
from sivae_dist.engine.run_folder import RunFolder
from sivae_dist.errors import UserError
from sivae_dist.evaluation import toy2d
from sivae_dist.files import write_json

ITERATIONS = 3000  # of a trial
REACH = 4.0
SEED = 1000  # of all trials; compared models have small ones
Range = tuple[float, float]  # the least and greatest multiple of the recipe's value that is tried
_AROUND: Range = (1 / REACH, REACH)
# What an objective weighs by. Rates, batch and length are the same for all and are not searched.
KNOBS: dict[ObjectiveName, dict[str, Range]] = {
    # Adam does not mind the scale of a loss, so of two weights only the ratio counts. Its recipe has Soft-IntroVAE's
    # weights; without that one's game far less KL is better (the least JSD on 8 Gaussians at 1/16 to 1/64).
    "vae": {"beta_kl": (1 / REACH**4, REACH)},
    "introvae": dict.fromkeys(("beta_rec", "beta_kl", "beta_neg", "margin"), _AROUND),
    "soft_introvae": dict.fromkeys(("beta_rec", "beta_kl", "beta_neg"), _AROUND),
}


NOTE = toy_report.CHOSEN  # in a trial's folder: how it was judged
Place = tuple[DensityName, ObjectiveName]


@dataclass(frozen=True)
class Trial:
    """One setting that is tried."""

    number: int
    job: Job
    settings: Mapping[str, float]


def plan(
    out: Path,
    densities: Sequence[DensityName],
    objectives: Sequence[ObjectiveName],
    *,
    trials: int,
    iterations: int,
    precision: PrecisionName = "fp32",
) -> list[Trial]:
    """Trials in folders out/DENSITY-OBJECTIVE-seed1000-trialN, all of number 0 first.

    Raises UserError for fewer than 2 trials, and where a folder holds another run.
    """
    if trials < 2:
        raise UserError(f"--tune is {trials}, expected 2 or more", "the first trial is the recipe itself")
    found = []
    for number in range(trials):
        for density in densities:
            for objective in objectives:
                settings = drawn(density, objective, number)
                tuned: Settings = {(density, objective): settings}
                (job,) = toy.plan(
                    out,
                    [density],
                    [objective],
                    seeds=[SEED],
                    iterations=iterations,
                    tuned=tuned,
                    precision=precision,
                    suffix=f"-trial{number}",
                )
                found.append(Trial(number, job, settings))
    return found


def finals(
    out: Path,
    trials: Sequence[Trial],
    *,
    count: int,
    seed: int,
    iterations: int | None = None,
    stop_after: int | None = None,
    precision: PrecisionName = "fp32",
) -> list[Trial]:
    """The best `count` finished trials of each density and objective as whole runs with a seed, all best ones first.

    In folders out/tune/DENSITY-OBJECTIVE-seedS-trialN, or out/DENSITY-OBJECTIVE-seedS where `settle` has moved one.
    Raises UserError where a folder holds another run.
    """
    ranked: dict[Place, list[Trial]] = {}
    for trial in sorted(trials, key=lambda each: (judged(each), each.number)):
        ranked.setdefault(place_of(trial), []).append(trial)
    found = []
    for rank in range(min(count, *(len(each) for each in ranked.values()))):
        for place in dict.fromkeys(place_of(trial) for trial in trials):
            trial, length = ranked[place][rank], (iterations, stop_after)
            found.append(
                whole_run(out / "tune", place, trial.settings, trial.number, seed, length, precision=precision)
            )
    check_homes(out, found)
    return found


def whole_run(
    folder: Path,
    place: Place,
    settings: Mapping[str, float],
    number: int,
    seed: int,
    length: tuple[int | None, int | None],
    *,
    precision: PrecisionName,
) -> Trial:
    """A trial as long as compared models, in folder/DENSITY-OBJECTIVE-seedS-trialN, or beside it if `settle` moved it.

    length: iterations and stop_after of `toy.plan`, which raises UserError.
    """
    (job,) = toy.plan(
        folder,
        [place[0]],
        [place[1]],
        seeds=[seed],
        iterations=length[0],
        stop_after=length[1],
        tuned={place: settings},
        precision=precision,
        suffix=f"-trial{number}",
    )
    settled = RunFolder(_home(folder.parent, job))
    if settled.config.exists() and toy.holds(settled, job.config):
        job = dataclasses.replace(job, run=settled)
    return Trial(number, job, settings)


def check_homes(out: Path, whole: Sequence[Trial]) -> None:
    """Raises UserError where the place of the compared model has a run that is none of these."""
    homes = {trial.job.run.root for trial in whole}
    for trial in whole:
        home = _home(out, trial.job)
        if home.exists() and home not in homes:
            raise UserError(f"{home} holds a run with settings that are not in the final", "give another --out")


def settle(out: Path, finalists: Sequence[Trial], folder: str = "tune") -> None:
    """Moves the best finished whole run of each density and objective to where compared models are, others away."""
    chosen = choose(finalists)
    for trial in finalists:
        home = _home(out, trial.job)
        away = out / folder / f"{home.name}-trial{trial.number}"
        if trial.job.run.root == home and chosen[place_of(trial)] != trial.settings:
            home.rename(away)
    for trial in finalists:
        home = _home(out, trial.job)
        if trial.job.run.root != home and chosen[place_of(trial)] == trial.settings:
            trial.job.run.root.rename(home)


def _home(out: Path, job: Job) -> Path:
    return out / f"{job.density}-{job.objective}-seed{job.seed}"


def place_of(trial: Trial) -> Place:
    """What competes: trials of the same density and objective."""
    return trial.job.density, trial.job.objective


def drawn(density: DensityName, objective: ObjectiveName, number: int) -> dict[str, float]:
    """The settings of a trial: a pure function of its number."""
    recipe = toy.recipe(density, objective).objective
    own = {knob: float(getattr(recipe, knob)) for knob in KNOBS[objective]}
    if number == 0:
        return own
    begin = uniform(key(SEED, "tune", density, objective), np.arange(len(own), dtype=np.uint64))
    shares = (begin + number * _steps(len(own))) % 1.0
    # Three digits: settings that are written down are those that were tried.
    ranges = KNOBS[objective].values()
    factors = [low * (high / low) ** float(share) for share, (low, high) in zip(shares, ranges, strict=True)]
    return {knob: float(f"{value * by:.3g}") for (knob, value), by in zip(own.items(), factors, strict=True)}


def _steps(dimensions: int) -> npt.NDArray[np.float64]:
    """Steps of the additive recurrence whose points fill a cube most evenly, however many are taken.

    (1/g, 1/g^2, ...) for the root g > 1 of g^(dimensions + 1) = g + 1: the golden ratio for one dimension, and its
    generalisation (M. Roberts, "The unreasonable effectiveness of quasirandom sequences", 2018).
    """
    g = 2.0
    for _ in range(60):  # contracts by a third or more each time
        g = (1.0 + g) ** (1.0 / (dimensions + 1))
    return g ** -np.arange(1.0, dimensions + 1)


def judged(trial: Trial) -> float:
    """Jensen-Shannon divergence, nats, of a trial; infinite if it was given up or draws no numbers.

    Kept in its folder.
    """
    if not trial.job.finished():
        return math.inf
    path = trial.job.run.root / NOTE
    try:
        return float(json.loads(path.read_text(encoding="utf-8"))["hist_jsd"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    size = toy_report.SAMPLES
    density = trial.job.density
    # The comparison has the 2 SAMPLES points before these.
    real = Toy2dStream(density).held_out(3 * size, batch=3 * size)[0].data[2 * size :]
    fake = load(trial.job.run.root, batch=8192).sample(size, seed=SEED)
    finite = bool(fake.isfinite().all())
    value = toy2d.histogram_jsd(real, fake, EXTENT[density]) if finite else math.inf
    write_json(path, {"hist_jsd": value, "settings": trial.settings})
    return value


def choose(trials: Sequence[Trial]) -> Settings:
    """The settings of the best finished trial of each density and objective; the earlier one of equals."""
    best: dict[Place, tuple[float, int, Mapping[str, float]]] = {}
    for trial in trials:
        place, value = place_of(trial), judged(trial)
        if place not in best or (value, trial.number) < best[place][:2]:
            best[place] = value, trial.number, trial.settings
    return {place: settings for place, (_, _, settings) in best.items()}


def write(trials: Sequence[Trial], path: Path, finalists: Sequence[Trial] = ()) -> Settings:
    """Chooses (among the finalists, if there are any), and writes all and the choice for `read` and for readers."""
    chosen = choose(finalists or trials)
    lines: dict[str, object] = {"chosen": by_name(chosen), **told(trials)}
    if finalists:
        lines["finals"] = told(finalists)
    write_json(path, lines)
    return chosen


def by_name(chosen: Settings) -> dict[str, dict[str, float]]:
    """As files have it."""
    return {f"{density}-{objective}": dict(settings) for (density, objective), settings in chosen.items()}


def told(trials: Sequence[Trial]) -> dict[str, object]:
    """What a file tells of trials: their length, their seed, and the settings and the divergence of each."""
    rows = [
        {
            "density": trial.job.density,
            "objective": trial.job.objective,
            "trial": trial.number,
            "hist_jsd": value if math.isfinite(value := judged(trial)) else None,
            "settings": dict(trial.settings),
        }
        for trial in trials
    ]
    points = max(trial.job.config.train.total_nimg for trial in trials)
    return {"points": points, "seed": trials[0].job.seed, "trials": rows}


def read(path: Path, densities: Sequence[DensityName], objectives: Sequence[ObjectiveName]) -> Settings:
    """The choice that `write` has left, for these densities and objectives. Raises UserError for anything else."""
    fix = "give the tune.json that `sivae-dist toy --tune N` wrote for the same densities and objectives"
    try:
        known = dict(json.loads(path.read_text(encoding="utf-8"))["chosen"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} holds no settings of the 2-D experiments ({error!s:.200})", fix) from error
    chosen: dict[tuple[DensityName, ObjectiveName], dict[str, float]] = {}
    for density in densities:
        for objective in objectives:
            name = f"{density}-{objective}"
            settings: object = known.get(name)
            named = isinstance(settings, dict) and set(settings) == set(KNOBS[objective])
            if not isinstance(settings, dict) or not named or not all(map(_weight, settings.values())):
                what = f"{path} has {settings!r:.100} for {name}, expected positive {', '.join(KNOBS[objective])}"
                raise UserError(what, fix)
            chosen[density, objective] = {knob: float(value) for knob, value in settings.items()}
    return chosen


def _weight(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0


def table(trials: Sequence[Trial], finalists: Sequence[Trial] = ()) -> str:
    """Markdown: the divergence of every trial and finalist by its number, and what was chosen."""
    chosen = choose(finalists or trials)
    count = 1 + max(trial.number for trial in trials)
    points = [max(trial.job.config.train.total_nimg for trial in each) for each in (trials, finalists) if each]
    lines = [
        f"{count} settings each, number 0 the recipe's; JSD (nats) of each after {points[0]} points"
        + (f", of the best ones after {points[1]}" if finalists else ""),
        "",
    ]
    ends = " in the end |" if finalists else ""
    lines += ["| density | objective |" + "".join(f" {n} |" for n in range(count)) + ends + " settings |"]
    lines += ["|---" * (3 + count + bool(finalists)) + "|"]
    for place, settings in chosen.items():
        mine = {t.number: judged(t) for t in trials if place_of(t) == place}
        last = ", ".join(f"{t.number}: {judged(t):.4f}" for t in finalists if place_of(t) == place)
        told = ", ".join(f"{knob} {value:g}" for knob, value in settings.items())
        cells = [*place, *(f"{mine[n]:.4f}" for n in range(count)), *([last] if finalists else []), told]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
