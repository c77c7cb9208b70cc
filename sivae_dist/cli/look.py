"""`sivae-dist sample | reconstruct | interpolate | mix`: looking at what a trained model does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from sivae_dist.cli.errors import interrupts_raise
from sivae_dist.errors import UserError

if TYPE_CHECKING:
    from sivae_dist.engine.load import Trained


@dataclass(frozen=True)
class Opening:
    """How the model is opened."""

    batch: int = 32
    """Images computed at once."""
    device: str = "auto"
    """auto (CUDA if there is any), cpu, cuda, cuda:1, ..."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Number format of the networks' computations."""
    average: bool = True
    """Take the averaged weights (EMA), or the current ones."""
    force: bool = False
    """Write over existing files."""

    def load(self, run: Path) -> Trained:
        """The model. From here on Ctrl-C cleans up."""
        from sivae_dist.engine.load import load  # noqa: PLC0415 (keeps --help quick)

        interrupts_raise()  # unfinished files are removed
        return load(run, average=self.average, device=self.device, precision=self.precision, batch=self.batch)


Flat = Annotated[Opening, tyro.conf.arg(name="")]
_DEFAULT = Opening()


def sample(
    run: Path,
    /,
    *,
    n: int | None = None,
    seed: int = 0,
    out: Path = Path("samples.png"),
    psi: float | None = None,
    truncation_sweep: tuple[float, ...] = (),
    noise: Literal["random", "fixed", "off"] = "random",
    label: int | None = None,
    opening: Flat = _DEFAULT,
) -> None:
    """Draw samples of a trained model: a grid, single pictures, or numbers.

    Args:
        run: Run folder or checkpoint folder.
        n: How many; by default 64, and 8 for a sweep. Sample k of a seed is the same for every n.
        seed: Another seed gives other samples.
        out: FILE.png for a grid, a folder (no ending) for single PNG files, FILE.npy or FILE.csv for numbers.
        psi: Truncation, for models with styles: 1 changes nothing, less is more typical and more alike.
        truncation_sweep: Values of psi, one row each, for example 0 0.25 0.5 0.75 1.
        noise: Noise maps of models that have some: every sample its own, the same for all, or none.
        label: Class of all samples; without it a conditional model's classes follow each other.
    """
    from sivae_dist.apps import sample as app  # noqa: PLC0415 (keeps --help quick)

    trained = opening.load(run)
    if not truncation_sweep:
        n = 64 if n is None else n
        done = app.sample(trained, out, n=n, seed=seed, psi=psi, noise=noise, label=label, force=opening.force)
    elif psi is not None or label is not None:
        raise UserError("--truncation-sweep goes with neither --psi nor --label", "leave them out")
    else:
        n = 8 if n is None else n
        done = app.sweep(trained, out, truncation_sweep, n=n, seed=seed, noise=noise, force=opening.force)
    print(done)


def reconstruct(
    run: Path,
    /,
    *,
    data: tuple[str, ...],
    out: Path = Path("reconstructions.png"),
    n: int = 16,
    sample_posterior: bool = False,
    seed: int = 0,
    noise: Literal["random", "fixed", "off"] = "fixed",
    label: int | None = None,
    report: Path | None = None,
    json: bool = False,
    opening: Flat = _DEFAULT,
) -> None:
    """Draw pictures and what a trained model makes of them, with the PSNR of each.

    Args:
        run: Run folder or checkpoint folder.
        data: Picture files, folders of pictures, or a packed data set (its held-out split). Pictures of another size
            are cropped to their centre square and resized, as packing does.
        out: FILE.png to draw; it shows the first 32.
        n: Pictures used, the first ones; 0 takes all.
        sample_posterior: Decode a code drawn from the posterior instead of its mean.
        seed: Keys that draw, and random noise.
        noise: Noise maps of models that have some: the same for all, every picture its own, or none.
        label: Class of all pictures, for conditional models; a packed data set knows its own.
        report: FILE.csv or FILE.json with the PSNR of every picture.
        json: Print the report as JSON instead of the table.
    """
    from sivae_dist.apps.reconstruct import reconstruct as app  # noqa: PLC0415 (keeps --help quick)

    if n < 0:
        raise UserError(f"--n is {n}, expected 0 (all) or more", "16 is usual")
    scores = app(
        opening.load(run),
        data,
        out,
        n=n,
        posterior_sample=sample_posterior,
        seed=seed,
        noise=noise,
        label=label,
        report=report,
        force=opening.force,
    )
    if json:
        import json as library  # noqa: PLC0415 (the option has its name)

        print(library.dumps(scores.to_dict() | {"picture": str(out)}, indent=2))
        return
    width = min(60, max(len(name) for name, _ in scores.psnr))
    for name, value in scores.psnr:
        print(f"{name[-60:]:<{width}}  {value:7.2f} dB")
    print(f"{'mean':<{width}}  {scores.mean:7.2f} dB")
    if scores.not_finite:
        print(f"{scores.not_finite} of {len(scores.psnr)} are not finite and left out of the mean")
    if scores.adjusted:
        size = f"{scores.side}x{scores.side}"
        print(f"{scores.adjusted} of {len(scores.psnr)} pictures were cropped to a square or resized to {size}")
    print(f"originals and reconstructions: {out}")


def interpolate(
    run: Path,
    /,
    *,
    seeds: tuple[int, ...] = (),
    images: tuple[Path, ...] = (),
    space: Literal["z", "style"] = "z",
    kind: Literal["slerp", "lerp"] | None = None,
    steps: int | None = None,
    loop: bool = False,
    out: Path = Path("walk.png"),
    fps: float = 30.0,
    psi: float | None = None,
    noise: Literal["fixed", "off"] = "fixed",
    label: int | None = None,
    opening: Flat = _DEFAULT,
) -> None:
    """Walk from sample to sample, or from picture to picture: a film or a strip.

    Args:
        run: Run folder or checkpoint folder.
        seeds: Walk through the first sample of each of these seeds.
        images: Walk through the codes (means) of these pictures instead.
        space: Walk in z, or in styles, for models that have them.
        kind: slerp goes along the sphere (for z, its default), lerp straight (for styles, their only one).
        steps: Frames from one station to the next; by default 60, for a strip 8.
        loop: Return from the last to the first.
        out: FILE.mp4, FILE.gif, a folder (no ending) for frames, or FILE.png for a strip.
        fps: Frames a second of a film.
        psi: Truncation of all frames, for models with styles.
        noise: Noise maps of models that have some: the same for all frames, or none.
        label: Class of all frames, for conditional models.
    """
    from sivae_dist.apps.interpolate import interpolate as app  # noqa: PLC0415 (keeps --help quick)

    if bool(seeds) == bool(images):
        raise UserError("the walk needs its stations: either --seeds or --images", "for example --seeds 1 2 3")
    done = app(
        opening.load(run),
        [str(station) for station in seeds or images],
        out,
        space=space,
        kind=kind,
        steps=steps,
        loop=loop,
        fps=fps,
        psi=psi,
        noise=noise,
        label=label,
        force=opening.force,
    )
    print(done)


def mix(
    run: Path,
    /,
    *,
    rows: tuple[str, ...],
    columns: tuple[str, ...],
    layers: str = "coarse",
    out: Path = Path("mix.png"),
    psi: float | None = None,
    noise: Literal["fixed", "off"] = "fixed",
    opening: Flat = _DEFAULT,
) -> None:
    """Mix styles: a matrix of every row's source with some layers of every column's.

    Args:
        run: Run folder or checkpoint folder of a model with styles.
        rows: Seeds or picture files.
        columns: Seeds or picture files.
        layers: What comes from the column: coarse, middle, fine, or layer numbers such as 2-5.
        out: FILE.png to draw.
        psi: Truncation of all sources.
        noise: Noise maps: the same for all, or none.
    """
    from sivae_dist.apps.mix import mix as app  # noqa: PLC0415 (keeps --help quick)

    done = app(opening.load(run), rows, columns, out, layers=layers, psi=psi, noise=noise, force=opening.force)
    print(done)


COMMANDS: dict[str, Callable[..., None]] = {
    "sample": sample,
    "reconstruct": reconstruct,
    "interpolate": interpolate,
    "mix": mix,
}
