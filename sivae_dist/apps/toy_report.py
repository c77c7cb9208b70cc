"""What the 2-D experiments gave: measures of every model, a table of means and spreads, the papers' two figures."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sivae_dist.apps.sheet import sheet
from sivae_dist.apps.toy import Job
from sivae_dist.data.toy2d import EXTENT, Toy2dStream
from sivae_dist.engine.load import Trained, load
from sivae_dist.engine.precision import Precision
from sivae_dist.engine.tracking import read_metrics
from sivae_dist.errors import UserError
from sivae_dist.evaluation import plots2d, toy2d
from sivae_dist.evaluation.grids import save_png
from sivae_dist.files import write_atomically, write_json

PUBLISHED_SAMPLES = 5000  # of data and model in a draw of the published KL and JSD
PUBLISHED_POINTS = 12_800  # of data in the published gnELBO
PUBLISHED_GRID = 1024  # grid points per axis there
SAMPLES = 100_000  # of data and model in the divergences in nats
SHOWN = 2000  # points of a scatter
FIGURE_GRID = 256  # a side, in pixels
_REAL, _OTHER = 0, SAMPLES  # first held-out number of the data, and of a second draw that tells the floor

Row = dict[str, Any]

# Key -> (heading, format). All are better when lower.
MEASURES = {
    "hist_kl": ("KL, nats", "{:.3f}"),
    "hist_jsd": ("JSD, nats", "{:.4f}"),
    "grid_nll": ("grid NLL, nats", "{:.3f}"),
    "published_kl": ("KL as published", "{:.3f}"),
    "published_jsd": ("JSD as published", "{:.3f}"),
    "published_gnelbo": ("gnELBO as published", "{:.3g}"),
}
_LOSSES = ("loss/", "rec/", "kl/", "exp_elbo/", "encoder/", "decoder/")  # how their tags begin
CHOSEN = "tune.json"  # in the folder of a run that a search has judged, and chosen by its own result


def real_points(job: Job) -> Tensor:
    """(2 SAMPLES, 2) held-out points of the job's density, the same for all jobs."""
    return Toy2dStream(job.density).held_out(2 * SAMPLES, batch=2 * SAMPLES)[0].data


def measured(job: Job) -> dict[str, Any]:
    """Measures of a trained job: computed once, kept in its folder as toy2d.json."""
    path = job.run.root / "toy2d.json"
    trained = load(job.run.root, batch=8192)
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        if known["nimg"] == trained.nimg and known["published_draws"] == _draws():
            return {**known, **_told(job)}
    except (OSError, ValueError, KeyError, TypeError):
        pass
    values: dict[str, Any] = {"nimg": trained.nimg, **measure(trained, job)}
    write_json(path, values)
    return {**values, **_told(job)}


def _told(job: Job) -> dict[str, Any]:
    """What a run itself tells: the losses and terms of its last report (of no phase before), and the time it took."""
    reports = [row for row in read_metrics(job.run.metrics) if any(tag.startswith("loss/") for tag in row)]
    last = reports[-1] if reports else {}
    told: dict[str, Any] = {"losses": {tag: value for tag, value in last.items() if tag.startswith(_LOSSES)}}
    told["seconds"] = {tag: last[tag] for tag in ("time/train_s", "time/cpu_s") if tag in last}
    if (job.run.root / CHOSEN).exists():
        told["chosen_by_its_result"] = True
    return told


def measure(trained: Trained, job: Job) -> dict[str, float]:
    """All measures of one model, and the floor of the divergences: those between two draws of the data."""
    extent = EXTENT[job.density]
    every = real_points(job)
    real, other = every[:SAMPLES], every[_OTHER:]
    fake = trained.sample(SAMPLES, seed=0)
    energy = toy2d.negative_elbo(Precision().players(trained.model))
    on_grid = toy2d.energies(energy, toy2d.grid(extent, PUBLISHED_GRID))
    on_points = toy2d.energies(energy, real[:PUBLISHED_POINTS])
    values = {"grid_nll": toy2d.grid_nll(on_points, on_grid, extent)}
    values["published_gnelbo"] = toy2d.gnelbo(on_points, on_grid)
    values["hist_kl_floor"] = toy2d.histogram_kl(real, other, extent)
    values["hist_jsd_floor"] = toy2d.histogram_jsd(real, other, extent)
    values["outside"] = float((fake.abs() > extent).any(1).double().mean())
    if bool(fake.isfinite().all()):  # what lies outside counts as one more cell
        values["hist_kl"] = toy2d.histogram_kl(real, fake, extent)
        values["hist_jsd"] = toy2d.histogram_jsd(real, fake, extent)
        values |= published(real, fake, extent)
    return {**values, "published_draws": _draws()}


def published(real: Tensor, fake: Tensor, extent: float) -> dict[str, float]:
    """The published KL and JSD: means over all disjoint draws of the published size, and how far one draw strays.

    One draw, as published, tells little: its KL strays as far as models of different seeds do, or farther (rings: 3 %
    and 1 %), and models that share it share its luck. Empty where a draw has no point in the square, for these know no
    outside.
    """
    pairs = list(zip(*(torch.split(points, PUBLISHED_SAMPLES) for points in (real, fake)), strict=True))
    if not all(bool((of_model.abs() <= extent).all(1).any()) for _, of_model in pairs):
        return {}
    values: dict[str, float] = {}
    for key, measure_of in (("published_kl", toy2d.published_kl), ("published_jsd", toy2d.published_jsd)):
        found = [measure_of(of_data, of_model, extent) for of_data, of_model in pairs]
        values |= {key: fmean(found), f"{key}_of_one_draw": stdev(found)}
    return values


def _draws() -> int:
    return SAMPLES // PUBLISHED_SAMPLES


def rows_of(jobs: Sequence[Job]) -> list[Row]:
    """What toy.json tells of each: measures, last losses, and which model it is. Measures what was not yet.

    Of a run that was given up before its end: that it was, and its last losses.
    """
    return [
        {
            "density": j.density,
            "objective": j.objective,
            "seed": j.seed,
            **(measured(j) if j.finished() else {"nimg": j.reached(), "given_up": True, **_told(j)}),
        }
        for j in jobs
    ]


def settings(jobs: Sequence[Job]) -> dict[str, Any]:
    """What must agree between jobs whose rows share a table, by density and objective."""
    return {
        f"{job.density}-{job.objective}": {
            "objective": dataclasses.asdict(job.config.objective),
            "train": {"kimg": job.config.train.kimg, "batch": job.config.train.batch},
            "optim": dataclasses.asdict(job.config.optim),
            **({} if job.config.precision.dtype == "auto" else {"precision": job.config.precision.dtype}),
        }
        for job in jobs
    }


def rows_from(path: Path, jobs: Sequence[Job]) -> list[Row]:
    """Rows of another toy.json, for the densities and objectives of `jobs`.

    Rows of models that are among the jobs are left out. Raises UserError where settings are not those of the jobs, or
    measures were taken otherwise.
    """
    fix = "give the toy.json that `sivae-dist toy` wrote with the same --iterations"
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        rows, theirs = list(known["runs"]), dict(known["settings"])
        own = {(job.density, job.objective, job.seed) for job in jobs}
        others = [row for row in rows if (row["density"], row["objective"], row["seed"]) not in own]
        names = [f"{row['density']}-{row['objective']}" for row in others]
        if not all(isinstance(row.get(key, 0.0), int | float) for row in others for key in (*MEASURES, "nimg", "seed")):
            raise ValueError("a measure is no number")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} holds no results of the 2-D experiments ({error!s:.200})", fix) from error
    mine = json.loads(json.dumps(settings(jobs)))  # tuples as JSON has them
    for name in names:
        if name in mine and theirs.get(name) != mine[name]:
            raise UserError(f"{path} has results of {name} with other settings than those of this run", fix)
    wanted = [row for row, name in zip(others, names, strict=True) if name in mine]
    if any(row.get("published_draws") != _draws() for row in wanted if not row.get("given_up")):
        what = f"{path} has results of another version, which measured otherwise"
        raise UserError(what, "run that command again there: nothing is trained anew, only measured")
    return wanted


def table(rows: Sequence[Row]) -> str:
    """Markdown: for each measure densities by objectives, mean +- standard deviation over seeds."""
    objectives = list(dict.fromkeys(row["objective"] for row in rows))
    seeds: dict[tuple[str, str], list[int]] = {}
    for row in rows:
        seeds.setdefault((row["density"], row["objective"]), []).append(row["seed"])
    counts = sorted({len(found) for found in seeds.values()})
    told = f"{counts[0]} seed(s)" if len(counts) == 1 else f"{counts[0]} to {counts[-1]} seeds, see toy.json"
    lines = [f"{told}, {max(row['nimg'] for row in rows)} points each; lower is better everywhere", ""]
    for key, (heading, pattern) in MEASURES.items():
        floor = any(f"{key}_floor" in row for row in rows)
        columns = [heading, *objectives, *(["two draws of the data"] if floor else [])]
        lines += ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
        for density in dict.fromkeys(row["density"] for row in rows):
            mine = [row for row in rows if row["density"] == density]
            cells: list[str] = [density]
            for objective in objectives:
                cells.append(spread([r.get(key, math.nan) for r in mine if r["objective"] == objective], pattern))
            if floor:
                cells.append(spread([row[f"{key}_floor"] for row in mine if f"{key}_floor" in row][:1], pattern))
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    lines += ["The last losses and terms of every run are in toy.json."]
    seeds_chosen = sorted({row["seed"] for row in rows if row.get("chosen_by_its_result")})
    if seeds_chosen:
        names = ", ".join(map(str, seeds_chosen))
        lines += [f"Models of seed {names} were chosen among the finalists of the search by their own results."]
    return "\n".join(lines)


def spread(values: Sequence[float], pattern: str) -> str:
    """Mean +- standard deviation of some numbers; how many of them do not exist is told."""
    there = [value for value in values if math.isfinite(value)]
    if not there:
        return "-"
    text = pattern.format(fmean(there)) + (f" ± {pattern.format(stdev(there))}" if len(there) > 1 else "")
    return text + (f" ({len(values) - len(there)} of {len(values)} failed)" if len(there) < len(values) else "")


def figures(jobs: Sequence[Job], rows: Sequence[Row], out: Path) -> None:
    """samples.png and density.png: densities by objectives, models of the lowest seed. rows: those of the jobs."""
    seed = min(job.seed for job, row in zip(jobs, rows, strict=True) if not row.get("given_up"))
    chosen = {(job.density, job.objective): (job, r) for job, r in zip(jobs, rows, strict=True) if job.seed == seed}
    densities = list(dict.fromkeys(density for density, _ in chosen))
    objectives = list(dict.fromkeys(objective for _, objective in chosen))
    scatters, heats, captions = [], [], []
    for density in densities:
        first = next(job for (name, _), (job, _) in chosen.items() if name == density)
        extent = EXTENT[first.density]
        scatters.append([plots2d.scatter(real_points(first)[:SHOWN], extent, size=FIGURE_GRID)])
        heats.append([plots2d.heat(torch.log1p(toy2d.counts(real_points(first), extent, FIGURE_GRID // 2)))])
        captions.append([""])
        for objective in objectives:
            job, result = chosen[density, objective]
            if result.get("given_up"):
                empty = np.full((FIGURE_GRID, FIGURE_GRID, 3), 255, np.uint8)
                scatters[-1].append(empty)
                heats[-1].append(empty)
                captions[-1].append(f"not finite after {result['nimg']} points")
                continue
            trained = load(job.run.root, batch=8192)
            scatters[-1].append(plots2d.scatter(trained.sample(SHOWN, seed=1), extent, size=FIGURE_GRID))
            energy = toy2d.negative_elbo(Precision().players(trained.model))
            on_grid = toy2d.energies(energy, toy2d.grid(extent, FIGURE_GRID))
            heats[-1].append(plots2d.heat(torch.exp(-on_grid).reshape(FIGURE_GRID, FIGURE_GRID)))
            captions[-1].append(f"JSD {result.get('hist_jsd', math.nan):.3f}, NLL {result['grid_nll']:.2f}")
    labels = ["data", *objectives]
    below = f"seed {seed}, {max(r['nimg'] for r in rows)} points seen"
    for name, pictures, title in (
        ("samples", scatters, f"{SHOWN} samples; {below}"),
        ("density", heats, f"exp(ELBO), each from its least to its largest value (data: log of counts); {below}"),
    ):
        picture = sheet(pictures, title=title, row_labels=densities, column_labels=labels, captions=captions)
        save_png(out / f"{name}.png", picture)


def write(jobs: Sequence[Job], out: Path, also: Sequence[Path] = ()) -> str:
    """Measures all jobs, writes toy.md, toy.json, samples.png and density.png. Returns the table.

    also: other toy.json files whose rows enter the table and the new toy.json. Figures show the jobs.
    """
    more = [row for path in also for row in rows_from(path, jobs)]
    own = rows_of(jobs)
    seen: dict[tuple[str, str, int], Row] = {}
    for row in [*own, *more]:
        seen.setdefault((row["density"], row["objective"], row["seed"]), row)
    rows = list(seen.values())
    text = table(rows)
    write_atomically(out / "toy.md", text + "\n")
    write_json(out / "toy.json", {"runs": rows, "settings": settings(jobs)})
    if not all(row.get("given_up") for row in own):
        figures(jobs, own, out)
    return text
