"""A second search for settings of the 2-D experiments, around those that are there: one weight changed at a time.

The trials of `toy_tune` are short and lie far apart; what they choose may have better neighbours. Here every objective
gets as many changes of its choice, each trained as long as the compared models and judged by the search's points: all
its weights are halved in turn, then doubled, then changed by finer and by coarser factors. The best is the first of the
compared models.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from sivae_dist.apps import toy_tune
from sivae_dist.apps.toy import DensityName, ObjectiveName, PrecisionName, Settings
from sivae_dist.apps.toy_tune import KNOBS, Trial, judged, place_of
from sivae_dist.errors import UserError
from sivae_dist.files import write_json

FOLDER = "refine"
FACTORS = (0.5, 2.0, 0.5**0.5, 2.0**0.5, 0.25, 4.0)  # by which every weight is changed, in this order
MOST = len(FACTORS)  # changes of an objective with one weight


def plan(
    out: Path,
    densities: Sequence[DensityName],
    objectives: Sequence[ObjectiveName],
    *,
    changes: int,
    seed: int,
    around: Settings | None = None,
    iterations: int | None = None,
    stop_after: int | None = None,
    precision: PrecisionName = "fp32",
) -> list[Trial]:
    """Whole runs of the settings `around` (default: the recipes') and of so many changes of each, unchanged ones first.

    In folders out/refine/DENSITY-OBJECTIVE-seedS-trialN, or out/DENSITY-OBJECTIVE-seedS where one was moved to. Raises
    UserError for a number of changes that is not there, and where a folder holds another run.
    """
    if not 1 <= changes <= MOST:
        raise UserError(f"--refine is {changes}, expected 1 to {MOST}", f"{MOST} halve and double three weights")
    found = []
    for number in range(changes + 1):
        for density in densities:
            for objective in objectives:
                place = density, objective
                own = (around or {}).get(place) or toy_tune.drawn(density, objective, 0)
                settings, length = near(objective, own, number), (iterations, stop_after)
                found.append(
                    toy_tune.whole_run(out / FOLDER, place, settings, number, seed, length, precision=precision)
                )
    toy_tune.check_homes(out, found)
    return found


def near(objective: ObjectiveName, own: Mapping[str, float], number: int) -> dict[str, float]:
    """The settings of a trial; of number 0 unchanged."""
    settings, knobs = dict(own), list(KNOBS[objective])
    if number:
        turn, knob = divmod(number - 1, len(knobs))
        # Three digits: settings that are written down are those that were tried.
        settings[knobs[knob]] = float(f"{own[knobs[knob]] * FACTORS[turn]:.3g}")
    return settings


def write(trials: Sequence[Trial], path: Path, before: Path | None) -> Settings:
    """Chooses, and writes the choice and all trials to `path`, with what the file `before` tells of earlier ones."""
    known = json.loads(before.read_text(encoding="utf-8")) if before is not None else {}
    chosen = toy_tune.choose(trials)
    rounds = [*known.get("refined", []), toy_tune.told(trials)]
    names = {**known.get("chosen", {}), **toy_tune.by_name(chosen)}
    write_json(path, {**known, "chosen": names, "refined": rounds})
    return chosen


def table(trials: Sequence[Trial]) -> str:
    """Markdown: the divergence with the settings that were there, with every change of them, and what was chosen."""
    points = max(trial.job.config.train.total_nimg for trial in trials)
    lines = [f"JSD (nats) after {points} points, and with one weight changed", ""]
    lines += ["| density | objective | unchanged | changed | settings |", "|---|---|---|---|---|"]
    for place, settings in toy_tune.choose(trials).items():
        first, *others = [trial for trial in trials if place_of(trial) == place]
        changed = [
            f"{knob} {value:g}: {judged(trial):.4f}"
            for trial in others
            for knob, value in trial.settings.items()
            if value != first.settings[knob]
        ]
        told = ", ".join(f"{knob} {value:g}" for knob, value in settings.items())
        lines.append(f"| {place[0]} | {place[1]} | {judged(first):.4f} | {', '.join(changed)} | {told} |")
    return "\n".join(lines)
