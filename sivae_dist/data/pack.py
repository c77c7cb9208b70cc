"""Packing a source into a shard folder: parallel, resumable after any interruption, the same bytes however it ran.

While it works, DESTINATION/.pack holds the list of items, the options and one note per finished shard; the manifest is
written last and .pack removed, so a folder with a manifest is complete.
"""

from __future__ import annotations

import fcntl
import functools
import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from sivae_dist.data.files import write_atomically
from sivae_dist.data.manifest import FILE_NAME, SPLITS, Manifest
from sivae_dist.data.pack_items import ItemList, list_items, read_items
from sivae_dist.data.pack_shard import PackOptions, ShardDone, ShardTask, differences, encoded, pack_shard, recorded
from sivae_dist.data.procs import run_tasks, usable_cores
from sivae_dist.data.sources.base import Source
from sivae_dist.errors import UserError

_PROBES = 16  # pictures encoded beforehand to estimate the size
_TAR_OVERHEAD = 512 + 1024  # header of the picture, and its small JSON member with header
_MARGIN = 1.1
_LOCK_WAIT_S = 3.0

Skipped = tuple[tuple[str, str], ...]  # (key, reason)


@dataclass(frozen=True)
class PackReport:
    """What was done. skipped: (key, reason); reused: shards found finished; seconds: wall time of this run."""

    manifest: Manifest
    skipped: Skipped
    enlarged: int
    reused: int
    seconds: float


def pack(
    source: Source, destination: Path, options: PackOptions, *, workers: int | None = None, progress: bool = True
) -> PackReport:
    """Packs all items of `source` into the shard folder `destination`.

    Run again with the same arguments it continues where it was interrupted, or finds that all is done.
    workers: processes, None for one per usable core; the result does not depend on it. Raises UserError.
    """
    begin = time.monotonic()
    destination = Path(destination).expanduser()
    aside = destination / ".pack"
    _check_destination(destination, aside)
    with _lock(aside):
        items = list_items(
            source, aside / "items.jsonl", val_fraction=options.val_fraction, val_count=options.val_count
        )
        note = recorded(options, source, items.sha256)
        if (destination / FILE_NAME).is_file():
            shutil.rmtree(aside)
            manifest, skipped = _finished(destination, note)
            return PackReport(manifest, skipped, 0, len(manifest.shards), time.monotonic() - begin)
        mean_bytes = _same_options(aside / "options.json", note) or _estimate(source, items, options)
        write_atomically(aside / "options.json", json.dumps(note | {"mean_bytes": mean_bytes}).encode())
        tasks = _tasks(items, options, mean_bytes)
        done = {t.name: d for t in tasks if (d := ShardDone.load(aside / f"{t.name}.done", destination))}
        reused = len(done)
        todo = [t for t in tasks if t.name not in done]
        work = functools.partial(
            pack_shard, source=source, options=options, items=items.path, folder=destination, aside=aside
        )
        remaining = sum(len(t.offsets) for t in todo)
        _check_space(destination, remaining, mean_bytes)
        bar = tqdm(total=len(items), initial=len(items) - remaining, unit="img", desc="packing", disable=not progress)
        with bar:
            for result in run_tasks(work, todo, usable_cores() if workers is None else workers, bar.update):
                done[result.info.name] = result
        manifest, skipped, enlarged = _conclude(source, destination, items, [done[t.name] for t in tasks], note)
        shutil.rmtree(aside)
    return PackReport(manifest, skipped, enlarged, reused, time.monotonic() - begin)


def _check_destination(destination: Path, aside: Path) -> None:
    if destination.exists() and not destination.is_dir():
        raise UserError(f"{destination} is a file, expected a folder to write shards to", "choose another destination")
    known = aside.is_dir() or (destination / FILE_NAME).is_file()
    if destination.is_dir() and not known and any(destination.iterdir()):
        raise UserError(f"{destination} is not empty", "choose a new folder, or empty it")
    try:
        aside.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{destination} cannot be made: {error.strerror}", "choose a writable destination") from None


@contextmanager
def _lock(aside: Path) -> Iterator[None]:
    with open(aside / "lock", "w") as file:
        deadline = time.monotonic() + _LOCK_WAIT_S  # workers of a killed run hold the lock until they end, too
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                if time.monotonic() > deadline:
                    what = f"another process is packing into {aside.parent}"
                    raise UserError(what, "wait for it, or end it") from None
                time.sleep(0.1)
        yield


def _finished(destination: Path, note: dict[str, Any]) -> tuple[Manifest, Skipped]:
    path = destination / FILE_NAME
    manifest = Manifest.from_bytes(path.read_bytes(), str(path))
    if changes := differences(manifest.packing, note):
        what = f"{destination} is already packed, otherwise ({'; '.join(changes)})"
        raise UserError(what, "choose another destination")
    skipped = destination / "skipped.json"
    entries = json.loads(skipped.read_bytes()) if skipped.is_file() else []
    return manifest, tuple((entry["key"], entry["reason"]) for entry in entries)


def _same_options(path: Path, note: dict[str, Any]) -> float | None:
    """The estimate of an interrupted packing with these very options; None when there was none. Raises UserError."""
    if not path.is_file():
        return None
    old = json.loads(path.read_bytes())
    if changes := differences(old, note):
        what = f"{path.parent.parent} is partly packed, with other options ({'; '.join(changes)})"
        raise UserError(what, "repeat the first command to finish it, or remove the folder to start afresh")
    return float(old["mean_bytes"])


def _estimate(source: Source, items: ItemList, options: PackOptions) -> float:
    """Mean bytes a sample takes in a tar, from some pictures spread evenly over the source."""
    numbers = np.unique(np.linspace(0, len(items) - 1, _PROBES).astype(np.int64))
    sizes, reason = [], ""
    for item in read_items(items.path, items.offset[numbers]):
        try:
            sizes.append(len(encoded(source, item, options)[0]) + _TAR_OVERHEAD)
        except MemoryError:
            raise
        except Exception as error:
            reason = f"{item.key}: {error}"
    if not sizes:
        raise UserError(f"none of {len(numbers)} pictures tried can be read; the last, {reason}", "check the source")
    return float(np.mean(sizes))


def _tasks(items: ItemList, options: PackOptions, mean_bytes: float) -> list[ShardTask]:
    per_shard = options.samples_per_shard(mean_bytes)
    tasks: list[ShardTask] = []
    for split in SPLITS:
        order = items.order(split, options.seed, shuffle=options.shuffle)
        # Equal shards instead of full ones and a rest: the plan's reads stay large.
        for part in np.array_split(order, -(-len(order) // per_shard)) if len(order) else []:
            tasks.append(ShardTask(f"shard-{len(tasks):06d}", split, items.offset[part]))
    return tasks


def _check_space(destination: Path, samples: int, mean_bytes: float) -> None:
    need, free = samples * mean_bytes * _MARGIN, shutil.disk_usage(destination).free
    if need > free:
        what = f"{destination} has {free / 1e9:.1f} GB free, about {need / 1e9:.1f} GB are needed"
        raise UserError(what, "free some space, choose another disk, a lower --quality, or --format webp")


def _conclude(
    source: Source, destination: Path, items: ItemList, done: list[ShardDone], note: dict[str, Any]
) -> tuple[Manifest, Skipped, int]:
    skipped = tuple(entry for d in done for entry in d.skipped)
    kept = [d.info for d in done if d.info.count]
    if not any(info.split == "train" for info in kept):
        raise UserError(f"no picture could be read; the first: {': '.join(skipped[0])}", "check the source")
    for d in done:
        if not d.info.count:
            for end in ("tar", "index"):
                (destination / f"{d.info.name}.{end}").unlink(missing_ok=True)
    names = tuple(getattr(source, "class_names", ()))
    classes = max(items.classes, len(names)) if items.classes else 0
    for stale in destination.glob(".*.tmp"):  # of a run that was killed between writing and renaming
        stale.unlink()
    manifest = Manifest(
        name=source.name,
        license=source.license,
        resolution=note["resolution"],
        channels=note["channels"],
        image_format=note["format"],
        classes=classes,
        class_names=names if len(names) == classes else (),
        shards=tuple(kept),
        packing=note,
    )
    if skipped:
        lines = ",\n".join(json.dumps({"key": k, "reason": r}) for k, r in skipped)
        write_atomically(destination / "skipped.json", f"[\n{lines}\n]\n".encode())
    write_atomically(destination / FILE_NAME, manifest.to_bytes())
    return manifest, skipped, sum(d.enlarged for d in done)
