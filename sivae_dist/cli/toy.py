"""`sivae-dist toy | theorems`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

from sivae_dist.cli.errors import interrupts_raise
from sivae_dist.errors import UserError


def toy(
    *,
    all: bool = False,
    density: tuple[Literal["8gaussians", "2spirals", "checkerboard", "rings"], ...] = (),
    objective: tuple[Literal["vae", "introvae", "soft_introvae"], ...] = (),
    seeds: int = 5,
    first_seed: int = 0,
    iterations: int | None = None,
    stop_after: int | None = None,
    tune: int | None = None,
    tune_iterations: int = 3000,
    finalists: int = 2,
    refine: int | None = None,
    tuned: Path | None = None,
    precision: Literal["fp32", "bf16"] = "fp32",
    jobs: int = 1,
    also: tuple[Path, ...] = (),
    out: Path = Path("runs/toy"),
) -> None:
    """Train the papers' 2-D experiments and compare them; the same command goes on where it was stopped.

    Args:
        all: All four densities with all three objectives: twelve models a seed.
        density: Only these densities.
        objective: Only these objectives.
        seeds: Models of each, with seeds first_seed, first_seed + 1, ...
        first_seed: The first seed.
        iterations: Iterations of 512 points, instead of the published 30000; schedules shrink in proportion.
        stop_after: End every model after so many iterations of its whole schedule; the last third changes little.
        tune: First try this many settings of every objective on every density (the recipe, and others spread
            around it) in shortened runs; then train with the best ones. All are told in tune.json.
        tune_iterations: Iterations of each of these trials.
        finalists: So many of the best trials of each are trained to the end, with the first seed, and the best of
            these is taken. 1: the best of the short trials, unseen.
        refine: Try so many changes of each setting (every weight halved in turn, then doubled, ...), trained to
            the end with the first seed, and train with the best. Around the recipes, or what --tuned has.
        tuned: Train with the settings of this tune.json instead of the recipes'.
        precision: bf16 computes the networks in half precision, in about two thirds of the time.
        jobs: Models trained at once, one thread each.
        also: Other toy.json files, of models trained elsewhere with the same settings, whose rows enter the table.
        out: Folder for the runs, the table (toy.md, toy.json) and the figures (samples.png, density.png).
    """
    if not (all or density or objective):
        raise UserError("nothing is chosen", "sivae-dist toy --all, or --density rings --objective vae soft_introvae")
    if finalists < 1:
        raise UserError(f"--finalists is {finalists}, expected 1 or more", "2 are usual")
    if seeds < 1:
        raise UserError(f"--seeds is {seeds}, expected 1 or more", "five are usual")
    if tune is not None and tuned is not None:
        raise UserError(
            "--tune and --tuned are given", "--tune searches for settings, --tuned takes those found before"
        )
    if tune is not None and refine is not None:
        raise UserError(
            "--tune and --refine are given", "--tune first, then --tuned OUT/tune.json --refine 6 in a new --out"
        )
    from sivae_dist.apps import toy as app  # noqa: PLC0415 (keeps --help quick)
    from sivae_dist.apps import toy_refine as refining  # noqa: PLC0415
    from sivae_dist.apps import toy_report as report  # noqa: PLC0415
    from sivae_dist.apps import toy_tune as tuning  # noqa: PLC0415

    interrupts_raise()  # the runs save and end
    densities, objectives = density or app.DENSITIES, objective or app.OBJECTIVES
    settings = tuning.read(tuned, densities, objectives) if tuned is not None else None
    if tune is not None:
        trials = tuning.plan(
            out / "tune", densities, objectives, trials=tune, iterations=tune_iterations, precision=precision
        )
        app.train([trial.job for trial in trials], out / "tune", at_once=jobs)
        best: list[tuning.Trial] = []
        if finalists > 1:
            best = tuning.finals(
                out,
                trials,
                count=finalists,
                seed=first_seed,
                iterations=iterations,
                stop_after=stop_after,
                precision=precision,
            )
            app.train([trial.job for trial in best], out / "tune", at_once=jobs)
        settings = tuning.write(trials, out / "tune.json", best)
        print(tuning.table(trials, best), end="\n\n")
        tuning.settle(out, best)
    if refine is not None:
        near = refining.plan(
            out,
            densities,
            objectives,
            changes=refine,
            seed=first_seed,
            around=settings,
            iterations=iterations,
            stop_after=stop_after,
            precision=precision,
        )
        app.train([trial.job for trial in near], out / refining.FOLDER, at_once=jobs)
        settings = refining.write(near, out / "tune.json", tuned)
        print(refining.table(near), end="\n\n")
        tuning.settle(out, near, refining.FOLDER)
    chosen = app.plan(
        out,
        densities,
        objectives,
        seeds=range(first_seed, first_seed + seeds),
        iterations=iterations,
        stop_after=stop_after,
        tuned=settings,
        precision=precision,
    )
    given_up = app.train(chosen, out, at_once=jobs)
    print(report.write(chosen, out, also))
    print(f"\nwritten: toy.md, toy.json, samples.png and density.png in {out}")
    if given_up:
        names = ", ".join(job.name for job in given_up)
        print(f"not finite, and given up: {names}; the table counts them as failed.")
        print(f"Remove its log in {out / 'logs'} to try one again")


def theorems(*, out: Path = Path("runs/theorems"), seed: int = 0) -> None:
    """Check the papers' theorems on spaces of five states, where everything is exact.

    Args:
        out: Folder for the figure (theorems.png).
        seed: Of the random tables that play begins with.
    """
    from sivae_dist.apps import theorems_report as report  # noqa: PLC0415 (keeps --help quick)

    print(report.report(out, seed=seed))
    print(f"\nwritten: {out / 'theorems.png'}")


COMMANDS: dict[str, Callable[..., None]] = {"toy": toy, "theorems": theorems}
