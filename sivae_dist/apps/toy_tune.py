"""The same search for good settings for every objective of the 2-D experiments, so that none has had more care.

For each density and objective: N trials, of which the first has the recipe's settings and the others spread the
objective's own weights evenly, on a logarithmic scale, between a quarter and four times the recipe's. (Random draws
leave gaps: seven of them had no VAE for 8 Gaussians whose code carries anything.) Trials are shortened runs with a seed
that no compared model has, judged by the Jensen-Shannon divergence to held-out points that the comparison does not use.
The best trial's settings are then those of the compared models, at full length.
"""

from __future__ import annotations

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
from sivae_dist.engine.run_folder import write_json
from sivae_dist.errors import UserError
from sivae_dist.evaluation import toy2d

ITERATIONS = 3000  # of a trial
REACH = 4.0  # weights are drawn between the recipe's / REACH and the recipe's * REACH
SEED = 1000  # of all trials; compared models have small ones
# What an objective weighs by. Rates, batch and length are the same for all and are not searched.
KNOBS: dict[ObjectiveName, tuple[str, ...]] = {
    "vae": ("beta_rec", "beta_kl"),
    "introvae": ("beta_rec", "beta_kl", "beta_neg", "margin"),
    "soft_introvae": ("beta_rec", "beta_kl", "beta_neg"),
}


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


def drawn(density: DensityName, objective: ObjectiveName, number: int) -> dict[str, float]:
    """The settings of a trial: a pure function of its number."""
    recipe = toy.recipe(density, objective).objective
    own = {knob: float(getattr(recipe, knob)) for knob in KNOBS[objective]}
    if number == 0:
        return own
    begin = uniform(key(SEED, "tune", density, objective), np.arange(len(own), dtype=np.uint64))
    shares = (begin + number * _steps(len(own))) % 1.0
    # Three digits: settings that are written down are those that were tried.
    factors = [REACH ** (2 * float(share) - 1) for share in shares]
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
    """Jensen-Shannon divergence, nats, of a finished trial; infinite if it draws no numbers. Kept in its folder."""
    path = trial.job.run.root / "tune.json"
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
    best: dict[tuple[DensityName, ObjectiveName], tuple[float, int, Mapping[str, float]]] = {}
    for trial in trials:
        place = trial.job.density, trial.job.objective
        value = judged(trial)
        if place not in best or value < best[place][0]:
            best[place] = value, trial.number, trial.settings
    return {place: settings for place, (_, _, settings) in best.items()}


def write(trials: Sequence[Trial], path: Path) -> Settings:
    """Chooses, and writes every trial and the choice to `path`, for `read` and for readers."""
    chosen = choose(trials)
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
    names = {f"{density}-{objective}": dict(settings) for (density, objective), settings in chosen.items()}
    write_json(path, {"chosen": names, "points": points, "seed": SEED, "trials": rows})
    return chosen


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


def table(trials: Sequence[Trial]) -> str:
    """Markdown: the divergence of the recipe, of the best trial, and what was chosen."""
    chosen = choose(trials)
    count = 1 + max(trial.number for trial in trials)
    points = max(trial.job.config.train.total_nimg for trial in trials)
    lines = [f"best of {count} settings each, by JSD (nats) after {points} points; the first is the recipe", ""]
    lines += ["| density | objective | recipe | best | settings |", "|---|---|---|---|---|"]
    for (density, objective), settings in chosen.items():
        mine = {t.number: judged(t) for t in trials if (t.job.density, t.job.objective) == (density, objective)}
        told = ", ".join(f"{knob} {value:g}" for knob, value in settings.items())
        lines.append(f"| {density} | {objective} | {mine[0]:.4f} | {min(mine.values()):.4f} | {told} |")
    return "\n".join(lines)
