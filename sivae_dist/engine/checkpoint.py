"""Checkpoints that are whole or absent, and that nothing can hide code in.

    checkpoints/nimg-000012345/   weights.safetensors    both players, current weights and buffers
                                  ema.safetensors        the same names, averaged
                                  optimizer.safetensors  PLAYER/PARAMETER/STATE
                                  state.json             format, nimg, plan salt, config, sums since the last report,
                                          time it took, counts of the guard, loss scales, the controller's strength
                                  files.json             size and sha256 of the others
    checkpoints/latest            name of the newest complete one

Of the sharded format (see checkpoint_sharded) weights and optimizer lie in parts, shard-*.safetensors, one a rank.

A checkpoint is written under another name, synced to disk and renamed; only then does `latest` move. So a run killed
at any instant resumes from the last complete one. Everything is JSON or safetensors: reading executes nothing.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from sivae_dist.distributed.parts import NAME as PART_NAME
from sivae_dist.distributed.parts import read_whole
from sivae_dist.distributed.replicated import Replicated
from sivae_dist.distributed.sharding import host_copies, put
from sivae_dist.distributed.strategy import Strategy, moments
from sivae_dist.errors import UserError
from sivae_dist.files import sync, write_atomically

FORMAT = 2  # that this version reads; 1: whole files, 2: parts
_MAX_JSON_BYTES = 16 << 20
_NAME = re.compile(r"nimg-(\d{9,})")
TENSOR_FILES = ("weights", "ema", "optimizer")
FILES = (*(f"{stem}.safetensors" for stem in TENSOR_FILES), "state.json")


@dataclass
class Snapshot:
    """Everything a run needs to go on, on the host, independent of the live tensors."""

    nimg: int
    tensors: dict[str, dict[str, Tensor]]  # file stem -> name -> tensor
    state: dict[str, Any] = field(default_factory=dict)  # JSON-able
    path: Path | None = None  # where it was read from
    sharded: bool = False  # its tensors are still in the parts at `path`, except where they were asked for


def snapshot(
    nimg: int,
    model: nn.Module,
    ema: nn.Module,
    optimizers: Strategy | dict[str, Optimizer],
    state: dict[str, Any],
    *,
    keep: bool = True,
) -> Snapshot:
    """Copies the training state to host memory, so that training may go on while it is written.

    optimizers: the strategy that holds them; plain ones by player, where there is none.
    keep: whether this rank wants the tensors. Collective if the strategy spreads them over ranks.
    """
    strategy = _strategy(model, optimizers)
    optimizer = {
        f"{player}/{name}/{key}": value
        for player in strategy.players
        for name, states in strategy.optimizer_state(player).items()
        for key, value in states.items()
    }
    tensors = {"weights": model.state_dict(), "ema": ema.state_dict(), "optimizer": optimizer}
    return Snapshot(nimg, {stem: host_copies(group, keep=keep) for stem, group in tensors.items()}, state)


def restore(saved: Snapshot, model: nn.Module, ema: nn.Module, optimizers: Strategy | dict[str, Optimizer]) -> None:
    """Puts a snapshot back into live objects. Raises UserError when it belongs to another architecture."""
    strategy = _strategy(model, optimizers)
    load_weights(model, saved.tensors["weights"], "the checkpoint")
    load_weights(ema, saved.tensors["ema"], "the checkpoint's average")
    strategy.weights_changed()
    stored: dict[str, dict[str, dict[str, Tensor]]] = {player: {} for player in strategy.players}
    for full_name, tensor in saved.tensors["optimizer"].items():
        player, _, rest = full_name.partition("/")
        name, _, key = rest.rpartition("/")
        stored.setdefault(player, {}).setdefault(name, {})[key] = tensor
    load_optimizers(strategy, stored)


def load_optimizers(strategy: Strategy, stored: Mapping[str, Mapping[str, Mapping[str, Tensor]]]) -> None:
    """Takes up the states of all optimizers, player -> parameter -> state -> tensor, whole or shared as parameters are.

    Raises UserError where one does not fit.
    """
    for player, optimizer in strategy.optimizers.items():
        for name, parameter in strategy.parameters(player).items():
            states = stored[player].get(name)
            if states is None:  # it was never stepped
                continue
            expected = dict.fromkeys(moments(optimizer), parameter.shape) | {"step": torch.Size()}
            if {key: value.shape for key, value in states.items()} != expected:
                got = ", ".join(f"{key} {tuple(value.shape)}" for key, value in states.items())[:200]
                raise UserError(
                    f"the checkpoint's optimizer state of {player}/{name} does not fit: {got}", _RESTORE_ADVICE
                )
        strategy.load_optimizer_state(player, stored[player])


def _strategy(model: nn.Module, optimizers: Strategy | dict[str, Optimizer]) -> Strategy:
    if isinstance(optimizers, Strategy):
        return optimizers
    return Replicated({player: getattr(model, player) for player in optimizers}, optimizers)


def load_weights(module: nn.Module, tensors: dict[str, Tensor], what: str) -> None:
    """Copies tensors into a module of the same names and shapes. Raises UserError naming what does not fit."""
    own = module.state_dict()
    missing, extra = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    shapes = [
        f"{name}: {tuple(tensors[name].shape)} there, {tuple(own[name].shape)} here"
        for name in own
        if name in tensors and tensors[name].shape != own[name].shape
    ]
    if missing or extra or shapes:
        details = [f"{len(missing)} missing"] * bool(missing) + [f"{len(extra)} unknown"] * bool(extra) + shapes[:2]
        first = (missing or extra or [""])[0]
        raise UserError(
            f"{what} is of another architecture ({'; '.join(details)}{', first ' + first if first else ''})",
            "resume with the config stored in the run, or start a new run with another --out",
        )
    with torch.no_grad():
        for name, tensor in own.items():
            put(tensor, tensors[name])


def write(folder: Path, saved: Snapshot) -> Path:
    """Writes a complete checkpoint into the run's checkpoint folder and moves `latest` to it. Returns its path."""
    final = folder / name_of(saved.nimg)
    aside = folder / f".{final.name}.tmp"
    shutil.rmtree(aside, ignore_errors=True)
    try:
        _write_files(aside, saved)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)  # a part of a checkpoint only fills the disk further
        raise
    return publish(aside, final)


def publish(aside: Path, final: Path) -> Path:
    """Gives a folder of files that are all on the disk the name of a complete checkpoint, and moves `latest` to it."""
    remove(final)  # an earlier life of this run may have written it before it was taken back
    aside.rename(final)
    sync(final.parent)
    write_atomically(final.parent / "latest", final.name + "\n")
    return final


def _write_files(aside: Path, saved: Snapshot) -> None:
    aside.mkdir(parents=True)
    for stem in TENSOR_FILES:
        save_file(saved.tensors[stem], aside / f"{stem}.safetensors")
    write_lists(aside, {"format": 1, "nimg": saved.nimg, **saved.state})


def write_lists(aside: Path, state: dict[str, Any]) -> None:
    """state.json, then files.json of all files beside it; all is on the disk afterwards."""
    (aside / "state.json").write_text(json.dumps(state, indent=1), encoding="utf-8")
    files = sorted(path for path in aside.iterdir() if path.is_file())
    listing = {path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in files}
    (aside / "files.json").write_text(json.dumps(listing, indent=1), encoding="utf-8")
    for path in [*files, aside / "files.json"]:
        sync(path)
    sync(aside)


def remove(path: Path) -> None:
    """Deletes a checkpoint so that a kill in the middle never leaves something that looks complete."""
    if path.exists():
        doomed = path.with_name(f".{path.name}.deleted")
        shutil.rmtree(doomed, ignore_errors=True)
        path.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def debris(folder: Path) -> list[Path]:
    """What processes left that were killed while they wrote or deleted a checkpoint."""
    return sorted(path for end in ("tmp", "deleted") for path in folder.glob(f".nimg-*.{end}"))


def sweep(folder: Path) -> None:
    """Removes `debris`, which fills the disk. Only for the one process that writes there, before it writes."""
    for path in debris(folder):
        shutil.rmtree(path, ignore_errors=True)


def read(path: Path, *, parts: bool = True) -> Snapshot:
    """Reads a checkpoint and checks it against its list of files. Raises UserError when it is damaged or newer.

    parts: whether tensors in parts are read, too, into whole ones; else `checkpoint_sharded.restore` does it.
    """
    try:
        state = _read_json(path / "state.json")
        # First of all: a newer format may have other files and other fields.
        if type(state["format"]) is not int or state["format"] > FORMAT:
            raise UserError(
                f"{path} has checkpoint format {state['format']!r:.80}, this version reads up to {FORMAT}",
                "update sivae-dist",
            )
        listing = listed(path)
        for name, facts in listing.items():
            if (path / name).stat().st_size != facts["bytes"] or _sha256(path / name) != facts["sha256"]:
                raise UserError(f"{path / name} differs from what was written (size or sha256)", _RESTORE_ADVICE)
        _check_state(path / "state.json", state)
        if set(listing) == set(FILES):
            tensors = {stem: load_file(path / f"{stem}.safetensors") for stem in TENSOR_FILES}
            return Snapshot(int(state["nimg"]), tensors, state, path)
        tensors = {}
        if parts:
            tensors = {stem: read_whole(path, f"{stem}/") for stem in ("weights", "optimizer")}
            tensors["ema"] = load_file(path / "ema.safetensors")
        return Snapshot(int(state["nimg"]), tensors, state, path, sharded=True)
    except KeyError as error:
        raise UserError(f"cannot read the checkpoint {path}: {error} is missing", _RESTORE_ADVICE) from error
    except (OSError, ValueError, TypeError, RecursionError, SafetensorError) as error:
        raise UserError(f"cannot read the checkpoint {path}: {error}"[:500], _RESTORE_ADVICE) from error


def read_state(path: Path) -> dict[str, Any]:
    """state.json of a checkpoint alone. Raises UserError when it cannot be read."""
    try:
        return _read_json(path / "state.json")
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"cannot read {path / 'state.json'}: {error}"[:500], _RESTORE_ADVICE) from error


def listed(path: Path) -> dict[str, dict[str, Any]]:
    """What files.json of a checkpoint says of each file: bytes and sha256. Raises UserError when it is no such list."""
    listing = _read_json(path / "files.json")
    others = set(listing) - {"ema.safetensors", "state.json"}
    in_parts = len(listing) == len(others) + 2 and others and all(PART_NAME.fullmatch(name) for name in others)
    if set(listing) != set(FILES) and not in_parts:
        raise UserError(f"{path}/files.json does not list the files of a checkpoint", _RESTORE_ADVICE)
    return listing


def damage(path: Path, *, sizes_only: bool = False) -> list[str]:
    """What is wrong with a checkpoint, one text a file; nothing where it is as it was written.

    sizes_only: a quick look. Else every byte is read, checksums are compared, and all that a resume reads is read.
    """
    found: list[str] = []
    try:
        listing = listed(path)
        _check_state(path / "state.json", _read_json(path / "state.json"))
        for name, facts in listing.items():
            if not (path / name).is_file():
                found.append(f"{name} is missing")
            elif (size := (path / name).stat().st_size) != facts["bytes"]:
                found.append(f"{name} has {size} bytes, {facts['bytes']} were written")
            elif not sizes_only and _sha256(path / name) != facts["sha256"]:
                found.append(f"{name} has other bytes than were written (sha256)")
        if not found and not sizes_only:
            read(path)
    except UserError as error:
        found.append(error.what)
    except (OSError, ValueError, TypeError, LookupError, RecursionError) as error:
        found.append(f"cannot be read: {error if isinstance(error, OSError) else repr(error)}"[:300])
    return found


def _read_json(path: Path) -> dict[str, Any]:
    if path.stat().st_size > _MAX_JSON_BYTES:
        raise UserError(f"{path} has more than {_MAX_JSON_BYTES} bytes", _RESTORE_ADVICE)
    value = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a {type(value).__name__}, expected keys and values", _RESTORE_ADVICE)
    return value


def _check_state(path: Path, state: dict[str, Any]) -> None:
    """Raises UserError when a field is not what every resume takes it for."""
    kinds = {"nimg": int, "plan_salt": int, "sums": dict, "data": str, "config": dict, "metrics": dict}
    for name, kind in kinds.items():
        value = state[name] if name == "nimg" else state.get(name, kind())
        out_of_range = isinstance(value, int) and not 0 <= value < 1 << 62
        if not isinstance(value, kind) or isinstance(value, bool) or out_of_range:
            raise UserError(f"{path} has {name} = {value!r:.80}, expected {kind.__name__}", _RESTORE_ADVICE)
    for tag, pair in state.get("sums", {}).items():  # a sum may be NaN or infinite, which reports then show
        numbers = isinstance(pair, list) and [type(v) for v in pair] in ([float, int], [int, int])
        if not numbers or abs(pair[1]) >= 1 << 62 or (type(pair[0]) is int and abs(pair[0]) >= 1 << 62):
            raise UserError(f"{path} has sums of {tag!r:.80} = {pair!r:.80}, expected sum and count", _RESTORE_ADVICE)


_RESTORE_ADVICE = "resume from another checkpoint of the run (--resume PATH), or start anew (--resume never)"


def complete(folder: Path) -> list[Path]:
    """The complete checkpoints in a run's checkpoint folder, oldest first."""
    return [path for path in all_of(folder) if (path / "files.json").is_file()]


def all_of(folder: Path) -> list[Path]:
    """The folders with names of checkpoints, also of what something else has damaged, oldest first."""
    found = [path for path in folder.iterdir() if _NAME.fullmatch(path.name)] if folder.is_dir() else []
    return sorted((path for path in found if path.is_dir()), key=nimg_of)


def name_of(nimg: int) -> str:
    """Name of the checkpoint after this many images."""
    return f"nimg-{nimg:09d}"


def nimg_of(path: Path) -> int:
    """Images seen by the checkpoint of this name."""
    return int(path.name.removeprefix("nimg-"))


def latest(folder: Path) -> Path | None:
    """The checkpoint to resume from: the one `latest` names, else the newest complete one, else None."""
    pointer = folder / "latest"
    if pointer.is_file():
        name = pointer.read_text(encoding="utf-8", errors="replace").strip()
        if _NAME.fullmatch(name) and (folder / name / "files.json").is_file():
            return folder / name
    found = complete(folder)
    return found[-1] if found else None


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
