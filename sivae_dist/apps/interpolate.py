"""A walk from picture to picture, or from sample to sample, through a model's codes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from sivae_dist.apps.output import claim, require_video, write_frames
from sivae_dist.apps.paths import Kind, walk
from sivae_dist.apps.sheet import sheet
from sivae_dist.apps.sources import code_of, described, image_range, name_of
from sivae_dist.engine.load import Trained
from sivae_dist.errors import UserError
from sivae_dist.evaluation.grids import Pixels, cells, save_png
from sivae_dist.progress import Bar

Space = Literal["z", "style"]
Still = Literal["fixed", "off"]  # noise that does not flicker

STRIP_STEPS, FILM_STEPS = 8, 60  # from station to station, where nobody says


def interpolate(
    trained: Trained,
    stations: Sequence[str],
    out: Path,
    *,
    space: Space = "z",
    kind: Kind | None = None,
    steps: int | None = None,
    loop: bool = False,
    fps: float = 30.0,
    psi: float | None = None,
    noise: Still = "fixed",
    label: int | None = None,
    force: bool = False,
) -> str:
    """Writes the walk through the stations (seeds and picture files) to `out` and returns what was written.

    .png: a strip, one row from each station to the next; .mp4, .gif or a folder of frames: a film.
    kind: None is slerp for codes (a prior sample's length is nearly constant) and lerp for styles (which have no such
    law). psi: truncates every frame. noise: a walk moves in the code alone, so no frame has its own.
    """
    if len(stations) < 2:
        raise UserError(f"a walk needs two stations or more, not {len(stations)}", "give seeds, or picture files")
    if space == "style" and kind == "slerp":
        raise UserError("slerp is for codes, styles have no sphere", "leave --kind out, or --space")
    if steps is not None and steps < 1:
        raise UserError(f"--steps is {steps}, expected 1 or more", f"{FILM_STEPS} from station to station is usual")
    if not 1 <= fps <= 120:
        raise UserError(f"--fps is {fps:g}, expected 1 to 120", "30 is usual")
    image_range(trained)
    claim(out, force=force, suffixes=(".mp4", ".gif", ".png"), folder=True)
    strip = out.suffix.lower() == ".png"
    if out.suffix.lower() == ".mp4":
        require_video()
    steps = steps or (STRIP_STEPS if strip else FILM_STEPS)
    codes = torch.cat([code_of(station, trained, label)[0] for station in stations])
    if space == "style":
        codes = trained.styles(codes)
    kind = kind or ("lerp" if space == "style" else "slerp")
    points = walk(codes, steps=steps, loop=loop, kind=kind)
    frames = _frames(trained, points, space, psi, noise, label)
    if strip:
        title = f"{kind} in {space} space: {described(trained, psi=psi, noise=noise)}"
        save_png(out, _strip(list(frames), [name_of(s) for s in stations], steps, loop=loop, title=title))
        return f"{len(points)} pictures from {len(stations)} stations: {out}"
    write_frames(out, frames, fps=fps)
    return f"{len(points)} frames from {len(stations)} stations: {out}"


def _frames(
    trained: Trained, points: Tensor, space: Space, psi: float | None, noise: Still, label: int | None
) -> Iterator[Pixels]:
    condition = trained.condition(label, 1)
    with Bar(total=len(points), desc="frames", unit="img", disable=None, leave=False) as progress:
        for start in range(0, len(points), trained.batch):
            part = points[start : start + trained.batch]
            if space == "style":
                styles = part if psi is None else trained.truncate(part, psi)
                x = trained.synthesise(styles, noise=noise)
            else:
                given = None if condition is None else condition.expand(len(part), -1)
                x = trained.decode(part, given, truncation_psi=psi, noise=noise)
            yield from cells(x, image_range(trained), min_cell=1)
            progress.update(len(part))


def _strip(frames: list[Pixels], names: list[str], steps: int, *, loop: bool, title: str) -> Pixels:
    """One row a stretch: steps + 1 pictures, the stations at both ends."""
    around = [*frames, frames[0]] if loop else frames
    stretches = len(names) if loop else len(names) - 1
    factor = max(1, -(-96 // max(frames[0].shape[:2])))
    large = [frame.repeat(factor, axis=0).repeat(factor, axis=1) for frame in around]
    rows = [large[i * steps : (i + 1) * steps + 1] for i in range(stretches)]
    captions = [[names[i], *[""] * (steps - 1), names[(i + 1) % len(names)]] for i in range(stretches)]
    return sheet(rows, title=title, captions=captions)
