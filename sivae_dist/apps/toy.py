"""The 2-D experiments: every density with every objective and seed, trained by the ordinary command, several at a time.

A job is a run folder like any other, trained by `sivae-dist train` in a process of its own. Jobs that are finished are
left alone, interrupted ones go on. Schedules of shortened runs shrink with them.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal, get_args

from sivae_dist.distributed import launcher
from sivae_dist.engine.config import RunConfig, from_dict, read_yaml, to_yaml
from sivae_dist.engine.guard import GIVEN_UP
from sivae_dist.engine.run_folder import RunFolder
from sivae_dist.errors import UserError
from sivae_dist.files import write_atomically
from sivae_dist.progress import Bar
from sivae_dist.resources import configs_dir

DensityName = Literal["8gaussians", "2spirals", "checkerboard", "rings"]
ObjectiveName = Literal["vae", "introvae", "soft_introvae"]
DENSITIES: tuple[DensityName, ...] = get_args(DensityName)
OBJECTIVES: tuple[ObjectiveName, ...] = get_args(ObjectiveName)
PrecisionName = Literal["fp32", "bf16"]

# Weights of objectives that are not the recipe's.
Settings = Mapping[tuple[DensityName, ObjectiveName], Mapping[str, float]]

_POLL_S = 1.0
_TAIL = 4096  # bytes of metrics.jsonl or of a log that are looked at


@dataclass(frozen=True)
class Job:
    """One model to train."""

    density: DensityName
    objective: ObjectiveName
    seed: int
    config: RunConfig
    run: RunFolder

    @property
    def name(self) -> str:
        """Of its folder."""
        return self.run.root.name

    def reached(self) -> int:
        """Images that its newest report tells of; 0 before there is one."""
        try:
            with open(self.run.metrics, "rb") as file:
                file.seek(max(0, self.run.metrics.stat().st_size - _TAIL))
                lines = file.read().splitlines()
            return int(json.loads(lines[-1])["nimg"]) if lines else 0
        except (OSError, ValueError, KeyError, IndexError):
            return 0

    def finished(self) -> bool:
        """Whether it was trained to its end."""
        try:
            summary = json.loads(self.run.summary.read_text(encoding="utf-8"))
            return bool(summary["finished"]) and int(summary["nimg"]) >= self.config.train.total_nimg
        except (OSError, ValueError, KeyError, TypeError):
            return False


@dataclass(eq=False)
class _Running:
    job: Job
    process: subprocess.Popen[bytes]
    log: IO[bytes]


def plan(
    out: Path,
    densities: Sequence[DensityName],
    objectives: Sequence[ObjectiveName],
    *,
    seeds: Sequence[int],
    iterations: int | None = None,
    stop_after: int | None = None,
    tuned: Settings | None = None,
    precision: PrecisionName = "fp32",
    suffix: str = "",
) -> list[Job]:
    """Jobs in folders out/DENSITY-OBJECTIVE-seedN{suffix}, seed by seed: a part of the work is a whole comparison.

    iterations: instead of the recipes' 30,000; warm-up, milestones, reports and checkpoints shrink in proportion.
    stop_after: iterations after which every model ends, within schedules that stay as they are.
    tuned:      weights of the objectives instead of the recipes'.
    precision:  number format of the networks' computations.
    Raises UserError where a folder holds a run with other settings.
    """
    jobs = []
    for seed in seeds:
        for density in densities:
            for objective in objectives:
                config = recipe(density, objective)
                weights = (tuned or {}).get((density, objective), {})
                config = dataclasses.replace(config, objective=dataclasses.replace(config.objective, **weights))  # type: ignore[arg-type]
                config = _cut(_of_length(config, iterations), stop_after)
                config = dataclasses.replace(config, train=dataclasses.replace(config.train, seed=seed))
                if precision != "fp32":  # which the recipes have
                    config = dataclasses.replace(
                        config, precision=dataclasses.replace(config.precision, dtype=precision)
                    )
                job = Job(
                    density, objective, seed, config, RunFolder(out / f"{density}-{objective}-seed{seed}{suffix}")
                )
                _check_same(job)
                jobs.append(job)
    return jobs


def recipe(density: DensityName, objective: ObjectiveName) -> RunConfig:
    """The published length and settings, from configs/toy."""
    path = configs_dir() / "toy" / f"{density}_{objective}.yaml"
    return from_dict(read_yaml(path), str(path))


def _of_length(config: RunConfig, iterations: int | None) -> RunConfig:
    if iterations is None:
        return config
    if iterations < 1:
        raise UserError(f"--iterations is {iterations}, expected 1 or more", "30000 is the published number")
    kimg = iterations * config.train.batch / 1000
    factor = kimg / config.train.kimg
    warmup = getattr(config.objective, "vae_warmup_kimg", None)
    objective = config.objective
    if warmup is not None:
        objective = dataclasses.replace(objective, vae_warmup_kimg=warmup * factor)  # type: ignore[call-arg]
    milestones = tuple(milestone * factor for milestone in config.optim.milestones_kimg)
    interval = 10 * config.train.batch / 1000  # reports cost time: at most every tenth iteration
    return dataclasses.replace(
        config,
        objective=objective,
        train=dataclasses.replace(config.train, kimg=kimg),
        optim=dataclasses.replace(config.optim, milestones_kimg=milestones),
        tracking=dataclasses.replace(config.tracking, every_kimg=max(config.tracking.every_kimg * factor, interval)),
        checkpoint=dataclasses.replace(
            config.checkpoint, every_kimg=max(config.checkpoint.every_kimg * factor, interval)
        ),
    )


def _cut(config: RunConfig, stop_after: int | None) -> RunConfig:
    if stop_after is None:
        return config
    kimg = stop_after * config.train.batch / 1000
    if not 0 < kimg <= config.train.kimg:
        most = round(1000 * config.train.kimg / config.train.batch)
        raise UserError(f"--stop-after is {stop_after}, expected 1 to the {most} iterations of a run", "lower it")
    return dataclasses.replace(config, train=dataclasses.replace(config.train, kimg=kimg))


def holds(run: RunFolder, config: RunConfig) -> bool:
    """Whether a run folder holds a run with this configuration."""
    return from_dict(read_yaml(run.config), str(run.config)) == config


def _check_same(job: Job) -> None:
    if not job.run.config.exists():
        return
    if not holds(job.run, job.config):
        raise UserError(
            f"{job.run.root} holds a run with other settings "
            "(another --iterations, --stop-after or --tune, or another version)",
            "give another --out, or remove that folder",
        )


def train(jobs: Sequence[Job], out: Path, *, at_once: int, progress: bool = True) -> list[Job]:
    """Trains what is not finished, `at_once` processes at a time, one thread each. Returns those that were given up.

    Given up: the guard has ended it, since its numbers did not stay finite, as it would again; that is a result.
    When it is interrupted, all of them save and end. Raises UserError, when the others are done, if some failed
    otherwise.
    """
    if at_once < 1:
        raise UserError(f"--jobs is {at_once}, expected 1 or more", "as many as there are processor cores")
    waiting = [job for job in jobs if not job.finished() and not _given_up(out, job)]
    running: list[_Running] = []
    failed: list[Job] = []
    total = sum(job.config.train.total_nimg for job in jobs) / 1000
    bar = "{desc} {percentage:3.0f}%|{bar}| {n:.0f}/{total:.0f} thousand points [{elapsed}<{remaining}{postfix}]"
    with Bar(total=total, desc="toy", bar_format=bar, disable=not progress, mininterval=1.0) as shown:
        shown.update(_done(jobs))
        shown.initial = shown.n  # time left is told from what is done now
        try:
            while waiting or running:
                while waiting and len(running) < at_once:
                    job = waiting.pop(0)
                    running.append(_start(job, out))
                time.sleep(_POLL_S)
                for ended in [each for each in running if each.process.poll() is not None]:
                    running.remove(ended)
                    ended.log.close()
                    if ended.process.returncode != 0 or not ended.job.finished():
                        failed.append(ended.job)
                shown.set_postfix_str(f"{len(running)} running, {len(waiting)} waiting", refresh=False)
                shown.update(max(0.0, _done(jobs) - shown.n))
        finally:
            _end(running)
    if failed := [job for job in failed if not _given_up(out, job)]:
        logs = ", ".join(str(_log(out, job)) for job in failed)
        last = _last_line(_log(out, failed[0]))
        raise UserError(
            f"{len(failed)} of {len(jobs)} runs did not finish ({last})", f"see {logs}; the same command goes on"
        )
    return [job for job in jobs if _given_up(out, job)]


def _start(job: Job, out: Path) -> _Running:
    recipe = out / "configs" / f"{job.name}.yaml"
    recipe.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(recipe, to_yaml(job.config))
    _log(out, job).parent.mkdir(parents=True, exist_ok=True)
    log = open(_log(out, job), "ab")  # noqa: SIM115 (closed when the process has ended)
    command = [sys.executable, "-m", "sivae_dist", "train", "--config", str(recipe), "--out", str(job.run.root)]
    process = subprocess.Popen(
        command,
        stdout=log,
        stderr=subprocess.STDOUT,
        # What the run's configuration says counts, not what a launcher that is not there would.
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_MIXED_PRECISION": "no", launcher.OWN: "1"},
        start_new_session=True,  # Ctrl-C reaches them through `_end` only
    )
    return _Running(job, process, log)


def _end(running: Sequence[_Running]) -> None:
    """Asks all to save and end, and waits until they have."""
    for each in running:
        each.process.terminate()
    for each in running:
        each.process.wait()
        each.log.close()


def _given_up(out: Path, job: Job) -> bool:
    """Whether the job ended by the guard: its own log says so, at its end."""
    if job.finished():
        return False
    try:
        return GIVEN_UP in _log(out, job).read_bytes()[-_TAIL:].decode("utf-8", "replace")
    except OSError:
        return False


def _done(jobs: Sequence[Job]) -> float:
    return sum(min(job.reached(), job.config.train.total_nimg) for job in jobs) / 1000


def _log(out: Path, job: Job) -> Path:
    return out / "logs" / f"{job.name}.log"


def _last_line(path: Path) -> str:
    try:
        lines = path.read_bytes()[-_TAIL:].decode("utf-8", "replace").strip().splitlines()
    except OSError:
        return "no log"
    return lines[-1][:200] if lines else "no output"
