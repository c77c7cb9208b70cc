"""Comparing finished or running runs: what each had learnt after equally many images, and after equally much time.

Only what the runs have written is read (config.yaml, manifest.json, metrics.jsonl, samples/): no data, no checkpoint,
nothing is computed anew. Runs that differ in nothing but the seed are a group, whose mean and spread are shown.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Literal

import torch

from sivae_dist.engine.config import RunConfig, from_dict, read_yaml, to_dict
from sivae_dist.engine.progressive import RESOLUTION
from sivae_dist.engine.resolution import Resolutions
from sivae_dist.engine.run_folder import RunFolder
from sivae_dist.engine.tracking import read_metrics
from sivae_dist.errors import UserError

Timer = Literal["train", "cpu"]  # the tags time/train_s and time/cpu_s
# Settings that change no result (or, as the length, none before the end): runs may differ in them within a group.
FREE = ("train.seed", "train.kimg", "train.minutes", "tracking", "checkpoint", "eval.every_kimg", "eval.at_start")
_EVAL = "eval/"
_MAX_METRICS_BYTES = 1 << 30


@dataclass(frozen=True)
class Evaluation:
    """One evaluation of a run: where it stood, and what it reached, on images of `resolution` pixels a side."""

    nimg: int
    seconds: dict[str, float]  # train, cpu; absent in runs that do not tell
    values: dict[str, float]  # metric, without eval/ -> value
    resolution: int  # 0 for points


@dataclass(frozen=True)
class Run:
    """A run as its folder tells it. evaluations: by images seen, ascending; at least one."""

    path: Path
    config: RunConfig
    data: str  # fingerprint of its data, "" when it is not known
    evaluations: list[Evaluation]
    parameters: dict[str, int]  # of encoder and decoder

    @property
    def name(self) -> str:
        """Name of the folder."""
        return self.path.absolute().name

    @property
    def slack(self) -> int:
        """Images an iteration at most: an evaluation that is due at N images happens before N + slack."""
        growth = self.config.progressive
        return max(growth.batch) if growth.enabled else self.config.train.batch


@dataclass
class Group:
    """Runs that differ in the seed only."""

    label: str
    runs: list[Run] = field(default_factory=list)


@dataclass(frozen=True)
class Figure:
    """A metric of a group: mean over its runs, and their standard deviation (n - 1), None for one run."""

    mean: float
    spread: float | None
    runs: int


@dataclass(frozen=True)
class Row:
    """What a group had reached at a mark. kimg, seconds: means over its runs of where those evaluations stood.

    resolutions: those at which its runs were evaluated there, ascending; figures compare where all are the same.
    """

    group: str
    kimg: float
    seconds: dict[str, float]
    figures: dict[str, Figure]
    resolutions: list[int]


@dataclass(frozen=True)
class Table:
    """One row a group. mark: "12 kimg" or "300 s"."""

    kind: Literal["images", "time"]
    mark: str
    rows: list[Row]


def read_run(path: Path) -> Run:
    """Raises UserError where the folder is no run, or one that was never evaluated."""
    folder = RunFolder(path)
    if not path.is_dir() or not folder.config.is_file():
        raise UserError(
            f"{path} is no run folder (it has no config.yaml)", "give folders that --out of a training made"
        )
    config = from_dict(read_yaml(folder.config), str(folder.config))
    resolutions = Resolutions(config)
    try:
        if folder.metrics.is_file() and folder.metrics.stat().st_size > _MAX_METRICS_BYTES:
            raise UserError(f"{folder.metrics} has more than {_MAX_METRICS_BYTES} bytes", "no run writes so much")
        found = [_evaluation(row, resolutions) for row in read_metrics(folder.metrics)]
    except (KeyError, ValueError, TypeError, OverflowError) as error:
        raise UserError(
            f"cannot read {folder.metrics}: {error}"[:500], "it must be as the training wrote it"
        ) from error
    evaluations = sorted((e for e in found if e is not None), key=lambda e: e.nimg)
    if not evaluations:
        raise UserError(
            f"{path} has no evaluation yet: metrics.jsonl holds no row with eval/...",
            "let it train on to the first one (eval.every_kimg), or leave it out",
        )
    with torch.device("meta"):
        model = config.model.build()
    parameters = {
        player: sum(p.numel() for p in getattr(model, player).parameters()) for player in ("encoder", "decoder")
    }
    return Run(path, config, _fingerprint(folder.manifest), evaluations, parameters)


def _evaluation(row: dict[str, float], resolutions: Resolutions) -> Evaluation | None:
    """The evaluation in a row of metrics.jsonl, None for a row of another kind."""
    values = {tag.removeprefix(_EVAL): float(value) for tag, value in row.items() if tag.startswith(_EVAL)}
    values.pop(RESOLUTION.removeprefix(_EVAL), None)
    if not values:
        return None
    tags: dict[str, str] = {"train": "time/train_s", "cpu": "time/cpu_s"}
    seconds = {timer: float(row[tag]) for timer, tag in tags.items() if tag in row}
    nimg = int(row["nimg"])
    return Evaluation(nimg, seconds, values, resolutions.of(nimg, row))


def _fingerprint(manifest: Path) -> str:
    try:
        facts = json.loads(manifest.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # an older or a copied run: then nothing is said about its data
        return ""
    return str(facts.get("data", "")) if isinstance(facts, dict) else ""


def grouped(runs: Sequence[Run]) -> list[Group]:
    """Groups in the order of their first runs. Raises UserError for a run given twice."""
    seen: set[Path] = set()
    for run in runs:
        place = run.path.resolve()
        if place in seen:
            raise UserError(f"{run.path} is given twice", "name every run once")
        seen.add(place)
    groups: dict[str, Group] = {}
    for run in runs:
        groups.setdefault(json.dumps(_essence(run), sort_keys=True), Group("")).runs.append(run)
    for group in groups.values():
        group.label = _common([run.name for run in group.runs])
    labels = [group.label for group in groups.values()]
    for group in groups.values():
        if labels.count(group.label) > 1:
            group.label = "+".join(run.name for run in group.runs)
    return list(groups.values())


def _essence(run: Run) -> dict[str, Any]:
    """What must agree within a group: settings by dotted name, and the data."""
    settings = {
        f"{section}.{key}": value for section, values in to_dict(run.config).items() for key, value in values.items()
    }
    kept = {key: v for key, v in settings.items() if key not in FREE and key.partition(".")[0] not in FREE}
    if run.data:  # the same data may lie in different places
        kept["data.url"] = run.data
    return kept


def _common(names: list[str]) -> str:
    """What the names of runs begin with in common, without a `-seed` left over; the first name if that is nothing."""
    if len(names) == 1:
        return names[0]
    first, last = min(names), max(names)
    length = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    return first[:length].rstrip("-_. ").removesuffix("seed").rstrip("-_. ") or names[0]


def differences(groups: Sequence[Group]) -> dict[str, list[Any]]:
    """Settings in which groups differ -> each group's value, None where its parts have no such setting."""
    each = [_essence(group.runs[0]) for group in groups]
    keys = list(dict.fromkeys(key for settings in each for key in settings))
    found = {key: [settings.get(key) for settings in each] for key in keys}
    return {key: values for key, values in found.items() if any(value != values[0] for value in values)}


def at_images(groups: Sequence[Group], kimg: float | None = None) -> Table:
    """Every run's evaluation at `kimg` thousand images; None: the most that all runs were evaluated at.

    Runs with other batches are evaluated up to a batch later than asked. Raises UserError when a run has none there.
    """
    runs = [run for group in groups for run in group.runs]
    if kimg is None:
        marks = sorted({e.nimg for run in runs for e in run.evaluations}, reverse=True)
        mark = next((m for m in marks if all(_at(run, m) is not None for run in runs)), None)
        if mark is None:
            raise UserError(
                f"there is no number of images at which all runs were evaluated; {_places(runs)}",
                "train them with one eval.every_kimg, or leave out those that do not fit",
            )
    else:
        mark = round(1000 * kimg)
        missing = [run for run in runs if _at(run, mark) is None]
        if missing:
            raise UserError(f"not evaluated at {kimg:g} kimg: {_places(missing)}", "give --at a place that all have")

    def pick(run: Run) -> Evaluation:
        found = _at(run, mark)
        assert found is not None
        return found

    return Table("images", f"{mark / 1000:g} kimg", [_row(group, pick) for group in groups])


def _at(run: Run, nimg: int) -> Evaluation | None:
    return next((e for e in run.evaluations if nimg <= e.nimg < nimg + run.slack), None)


def _places(runs: Sequence[Run]) -> str:
    def kimg(run: Run) -> str:
        all_of_them = [f"{e.nimg / 1000:g}" for e in run.evaluations]
        return " ".join(all_of_them if len(all_of_them) <= 8 else [*all_of_them[:4], "...", *all_of_them[-3:]])

    return "; ".join(f"{run.name} at {kimg(run)}" for run in runs[:4])


def at_time(groups: Sequence[Group], timer: Timer, seconds: float | None = None) -> Table:
    """Every run's last evaluation within so many seconds of training; None: the time of the run that trained least.

    Raises UserError when a run does not tell its time, or has no evaluation by then.
    """
    runs = [run for group in groups for run in group.runs]
    silent = [run.name for run in runs if not all(timer in e.seconds for e in run.evaluations)]
    if silent:
        raise UserError(
            f"time/{timer}_s is not in the metrics of {', '.join(silent[:4])}",
            "runs of older versions do not tell their time: compare them by images alone (--no-time)",
        )
    limit = min(run.evaluations[-1].seconds[timer] for run in runs) if seconds is None else seconds
    early = [run for run in runs if run.evaluations[0].seconds[timer] > limit]
    if early:
        first = ", ".join(f"{run.name} {run.evaluations[0].seconds[timer]:.1f} s" for run in early[:4])
        raise UserError(f"no evaluation within {limit:g} s, the first come at: {first}", "give --seconds more")

    def pick(run: Run) -> Evaluation:
        return [e for e in run.evaluations if e.seconds[timer] <= limit][-1]

    unit = "s" if timer == "train" else "CPU s"
    return Table("time", f"{limit:.4g} {unit}", [_row(group, pick) for group in groups])


def _row(group: Group, pick: Callable[[Run], Evaluation]) -> Row:
    picked = [pick(run) for run in group.runs]
    metrics = dict.fromkeys(metric for e in picked for metric in e.values)
    timers = [t for t in ("train", "cpu") if all(t in e.seconds for e in picked)]
    return Row(
        group.label,
        fmean(e.nimg for e in picked) / 1000,
        {t: fmean(e.seconds[t] for e in picked) for t in timers},
        {metric: figure([e.values[metric] for e in picked if metric in e.values]) for metric in metrics},
        sorted({e.resolution for e in picked}),
    )


def figure(values: Sequence[float]) -> Figure:
    """Mean and spread of at least one value; NaN or infinite ones make the mean so, and the spread NaN."""
    if not all(map(math.isfinite, values)):
        return Figure(sum(values), math.nan, len(values))
    return Figure(fmean(values), stdev(values) if len(values) > 1 else None, len(values))
