"""Where a run goes on, and whether it may."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sivae_dist.data import Stream
from sivae_dist.engine import checkpoint
from sivae_dist.engine.checkpoint import Snapshot
from sivae_dist.engine.config import RunConfig, from_dict, to_dict
from sivae_dist.engine.run_folder import RunFolder
from sivae_dist.errors import UserError
from sivae_dist.files import write_atomically
from sivae_dist.models import Autoencoder

# A resumed run must agree with its checkpoint in these: they fix what the weights mean and which sample comes when.
NEEDED = ("plan_salt", "sums", "data", "config")
_PICTURES = tuple(
    f"data.{name}"
    for name in ("split", "lanes", "window", "reduce", "decode", "mirror", "shift_px", "shift_fill", "hue")
)
_GROWTH = tuple(f"progressive.{name}" for name in ("enabled", "level_kimg", "fade_kimg", "batch"))
FIXED = ("model", *_GROWTH, "train.seed", *_PICTURES)
ORIGIN = "resumed_from"  # in state.json: the checkpoint that --resume PATH named, and what tells it from others


def find(run: RunFolder, resume_from: str, config: RunConfig) -> Snapshot | None:
    """The snapshot to start from, None for a fresh start. Raises UserError when it does not belong to this config.

    resume_from: as for `train`. A PATH is gone on from once: what this configuration has trained since then in this
    folder is gone on from instead, so that the same command loses nothing.
    """
    if resume_from == "never":
        if checkpoint.complete(run.checkpoints):
            raise UserError(
                f"{run.root} already holds a run, and --resume never asks for a new one",
                "choose another --out, or remove that folder",
            )
        return None
    newest = checkpoint.latest(run.checkpoints)
    asked = None if resume_from == "auto" else Path(resume_from)
    path = newest if asked is None or _goes_on(newest, asked, config) else asked
    if path is None:
        return None
    saved = checkpoint.read(path, parts=False)
    if path == asked:
        saved.state[ORIGIN] = _identity(asked)
    if missing := [name for name in NEEDED if name not in saved.state]:
        raise UserError(f"the checkpoint {path} has no {' and no '.join(missing)} to go on from", "resume from another")
    stored, wanted = _complete(saved.state["config"], str(path)), to_dict(config)
    for key in FIXED:
        before, now = _get(stored, key), _get(wanted, key)
        if before != now:
            detail = _difference(before, now)
            raise UserError(
                f"the checkpoint {path} was trained with {key} {detail}",
                "use the run's own config.yaml, or another --out for a new run",
            )
    return saved


def _goes_on(newest: Path | None, asked: Path, config: RunConfig) -> bool:
    """Whether the newest checkpoint of a folder was trained from `asked` by this very configuration."""
    if newest is None:
        return False
    try:
        state = checkpoint.read_state(newest)
    except UserError:  # damaged: then what was asked for
        return False
    origin, now = state.get(ORIGIN), _identity(asked)
    if (
        not isinstance(origin, dict)
        or origin.get("path") != now["path"]
        or now["sha256"] not in ("", origin.get("sha256"))
    ):
        return False
    return _complete(state.get("config", {}), str(newest)) == to_dict(config)


def _identity(path: Path) -> dict[str, str]:
    """What tells a checkpoint from others: where it is, and the hash of its list of files ("" where it is gone)."""
    listing = path / "files.json"
    sha256 = hashlib.sha256(listing.read_bytes()).hexdigest() if listing.is_file() else ""
    return {"path": str(path.resolve()), "sha256": sha256}


def settle(run: RunFolder, start: Path | None) -> None:
    """From now on the folder's run goes on from `start`, if that is one of its checkpoints, even if killed now."""
    if start is not None and start.resolve().parent == run.checkpoints.resolve():
        write_atomically(run.checkpoints / "latest", start.name + "\n")


def left_behind(run: RunFolder, nimg: int) -> list[Path]:
    """Checkpoints of the folder that are newer than where it goes on from: of a course that is given up."""
    return [path for path in checkpoint.complete(run.checkpoints) if checkpoint.nimg_of(path) > nimg]


@contextmanager
def reading_state_of(saved: Snapshot) -> Iterator[None]:
    """Within, every part of a run takes up its own fields of state.json; one that is no such field is a UserError."""
    try:
        yield
    except (TypeError, ValueError, KeyError, AttributeError, OverflowError) as error:
        raise UserError(
            f"state.json of the checkpoint {saved.path} holds what no part of a run has written: {error}"[:500],
            "resume from another checkpoint of the run (--resume PATH)",
        ) from error


def check_fits(stream: Stream, sample_shape: tuple[int, ...], model: Autoencoder, saved: Snapshot | None) -> None:
    """Raises UserError when data and model, or data and checkpoint, do not belong together."""
    if stream.sample_shape != sample_shape:
        raise UserError(
            f"the data have shape {_shape(stream.sample_shape)}, the model takes {_shape(sample_shape)}",
            "pack the data at the model's resolution (sivae-dist data pack --resolution ...), or set model.image_size "
            "and model.channels_in to the data's",
        )
    if model.condition_dim and model.condition_dim != stream.classes:
        raise UserError(
            f"model.condition_dim is {model.condition_dim}, the data have {stream.classes} classes",
            "set model.condition_dim to the number of classes (`sivae-dist data info` shows it), or to 0",
        )
    # An imported checkpoint names no data (""): the first run that goes on from it may bring its own.
    if saved is not None and saved.state["data"] not in ("", stream.fingerprint):
        raise UserError(
            "the data are not those the checkpoint was trained on (the manifests' hashes differ)",
            "point data.url at the same shards, or start a new run with another --out",
        )


def _complete(stored: dict[str, Any], source: str) -> dict[str, Any]:
    """A stored configuration with today's defaults for what did not exist when it was written."""
    try:
        return to_dict(from_dict(stored, source))
    except UserError:  # it has what no longer exists: then compare what is there
        return stored


def _get(values: dict[str, Any], dotted: str) -> Any:
    node: Any = values
    for part in dotted.split("."):
        node = node.get(part) if isinstance(node, dict) else None
    return node


def _difference(before: Any, now: Any) -> str:
    if isinstance(before, dict) and isinstance(now, dict):
        keys = [key for key in {**before, **now} if before.get(key) != now.get(key)]
        return ", ".join(f"{key} {before.get(key)!r} (now {now.get(key)!r})" for key in keys)
    return f"{before!r} (now {now!r})"


def _shape(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))
