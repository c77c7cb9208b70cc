"""Packing a source into a shard folder: parallel, resumable after any interruption, the same bytes however it ran.

Several resolutions make a pyramid: a shard folder each, DESTINATION/256, DESTINATION/512, ..., with the same samples at
the same places. While it works, DESTINATION/.pack holds the list of items, the options and one note per finished shard;
manifests are written last (after those of all levels a pyramid's own file) and .pack removed, so a folder with a
manifest is complete.
"""

from __future__ import annotations

import functools
import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sivae_dist.data import pack_aside
from sivae_dist.data.manifest import FILE_NAME, SPLITS, Manifest
from sivae_dist.data.pack_items import ItemList, list_items, read_items
from sivae_dist.data.pack_shard import (
    PackOptions,
    ShardDone,
    ShardTask,
    SourceLostError,
    differences,
    encoded,
    pack_shard,
    recorded,
)
from sivae_dist.data.procs import run_tasks, usable_cores
from sivae_dist.data.pyramid_file import FILE_NAME as PYRAMID_NAME
from sivae_dist.data.pyramid_file import PyramidFile, read_pyramid
from sivae_dist.data.sources.base import Source
from sivae_dist.data.stores.folder import FolderStore
from sivae_dist.errors import UserError
from sivae_dist.files import expanded, sync, write_atomically
from sivae_dist.progress import Bar

_PROBES = 16  # pictures encoded beforehand to estimate the size
_TAR_OVERHEAD = 512 + 1024  # header of the picture, and its small JSON member with header
_MARGIN = 1.1
_SKIPPED = "skipped.json"

Skipped = tuple[tuple[str, str], ...]  # (key, reason)
Means = tuple[float, ...]  # bytes of a sample at each resolution, tar headers included


@dataclass(frozen=True)
class PackReport:
    """What was done. manifests: one a resolution; skipped: (key, reason); enlarged: pictures smaller than the largest
    resolution; reused: shards found finished; seconds: wall time of this run.
    """

    manifests: tuple[Manifest, ...]
    skipped: Skipped
    enlarged: int
    reused: int
    seconds: float

    @property
    def manifest(self) -> Manifest:
        """The manifest of the largest resolution."""
        return self.manifests[-1]


def pack(
    source: Source, destination: Path, options: PackOptions, *, workers: int | None = None, progress: bool = True
) -> PackReport:
    """Packs all items of `source` into the shard folder (or the pyramid) `destination`.

    Run again with the same arguments it continues where it was interrupted, or finds that all is done.
    workers: processes, None for one per usable core; the result does not depend on it. Raises UserError.
    """
    begin = time.monotonic()
    destination = expanded(destination)
    folders = options.folders(destination)
    aside = destination / ".pack"
    _check_destination(destination, folders, aside)
    with pack_aside.held(aside):
        items = list_items(
            source,
            aside / "items.jsonl",
            val_fraction=options.val_fraction,
            val_count=options.val_count,
            progress=progress,
        )
        note = recorded(options, source, items.sha256)
        if finished := _finished(destination, folders, aside, note):
            _complete_pyramid(destination, folders, aside, finished[0])
            pack_aside.remove(aside)
            manifests, skipped = finished
            return PackReport(manifests, skipped, 0, len(manifests[0].shards), time.monotonic() - begin)
        means = _same_options(aside / "options.json", note) or _estimate(source, items, options)
        write_atomically(aside / "options.json", json.dumps(note | {"mean_bytes": means}).encode())
        for folder, side in zip(folders, options.resolutions, strict=True):
            folder.mkdir(exist_ok=True)
            (aside / str(side)).mkdir(exist_ok=True)
        sync(destination)
        tasks = _tasks(items, options, means)
        done = {t.name: d for t in tasks if (d := ShardDone.load(aside / f"{t.name}.done", folders))}
        reused = len(done)
        todo = [t for t in tasks if t.name not in done]
        work = functools.partial(
            pack_shard, source=source, options=options, items=items.path, folders=folders, aside=aside
        )
        remaining = sum(len(t.offsets) for t in todo)
        _check_space(destination, remaining, means)
        bar = Bar(total=len(items), initial=len(items) - remaining, unit="img", desc="packing", disable=not progress)
        with bar:
            for result in run_tasks(work, todo, usable_cores() if workers is None else workers, bar.update):
                done[result.name] = result
        manifests, skipped = _conclude(source, folders, items, [done[t.name] for t in tasks], note)
        if folders != (destination,):
            write_atomically(destination / PYRAMID_NAME, PyramidFile.of(manifests).to_bytes())
        pack_aside.remove(aside)
    enlarged = sum(d.enlarged for d in done.values())
    return PackReport(manifests, skipped, enlarged, reused, time.monotonic() - begin)


def _check_destination(destination: Path, folders: tuple[Path, ...], aside: Path) -> None:
    if destination.exists() and not destination.is_dir():
        raise UserError(f"{destination} is a file, expected a folder to write shards to", "choose another destination")
    known = aside.is_dir() or any((folder / FILE_NAME).is_file() for folder in (destination, *folders))
    if destination.is_dir() and not known and any(destination.iterdir()):
        raise UserError(f"{destination} is not empty", "choose a new folder, or empty it")


def _finished(
    destination: Path, folders: tuple[Path, ...], aside: Path, note: dict[str, Any]
) -> tuple[tuple[Manifest, ...], Skipped] | None:
    """The manifests of a packing that is complete, None when shards are missing. Raises UserError for another one."""
    found = {}
    for folder in dict.fromkeys((destination, *folders)):
        path = folder / FILE_NAME
        if not path.is_file():
            continue
        found[folder] = Manifest.from_bytes(path.read_bytes(), str(path))
        if changes := differences(found[folder].packing, note):
            if not (aside / "options.json").is_file():  # made by this call
                pack_aside.remove(aside)
            what = f"{folder} is already packed, otherwise ({'; '.join(changes)})"
            raise UserError(what, "choose another destination")
    if not all(folder in found for folder in folders):  # none, or a run was killed between two manifests
        return None
    skipped = folders[0] / _SKIPPED
    entries = json.loads(skipped.read_bytes()) if skipped.is_file() else []
    return tuple(found[folder] for folder in folders), tuple((entry["key"], entry["reason"]) for entry in entries)


def _complete_pyramid(
    destination: Path, folders: tuple[Path, ...], aside: Path, manifests: tuple[Manifest, ...]
) -> None:
    """The file at the root of a complete pyramid, where there is none: packed before there was one, or killed before.

    Raises UserError for one that lists other levels.
    """
    if folders == (destination,):
        return
    found, right = read_pyramid(FolderStore(destination)), PyramidFile.of(manifests)
    if found is None:
        write_atomically(destination / PYRAMID_NAME, right.to_bytes())
    elif found != right:
        pack_aside.remove(aside)
        what = f"{destination / PYRAMID_NAME} lists other levels than lie beside it"
        raise UserError(what, "copy the data set again; or remove this file and run the same command again")


def _same_options(path: Path, note: dict[str, Any]) -> Means | None:
    """The estimate of an interrupted packing with these very options; None when there was none. Raises UserError."""
    if not path.is_file():
        return None
    old = json.loads(path.read_bytes())
    if changes := differences(old, note):
        what = f"{path.parent.parent} is partly packed, with other options ({'; '.join(changes)})"
        raise UserError(what, "repeat the first command to finish it, or remove the folder to start afresh")
    means = old["mean_bytes"]
    return tuple(means) if isinstance(means, list) else (float(means),)


def _estimate(source: Source, items: ItemList, options: PackOptions) -> Means:
    """Mean bytes a sample takes in a tar at each resolution, from some pictures spread evenly over the source."""
    numbers = np.unique(np.linspace(0, len(items) - 1, _PROBES).astype(np.int64))
    sizes, reason = [], ""
    for item in read_items(items.path, items.offset[numbers]):
        try:
            sizes.append([len(data) + _TAR_OVERHEAD for data in encoded(source, item, options)[0]])
        except (MemoryError, SourceLostError):
            raise
        except Exception as error:
            reason = f"{item.key}: {error}"
    if not sizes:
        raise UserError(f"none of {len(numbers)} pictures tried can be read; the last, {reason}", "check the source")
    return tuple(np.mean(sizes, axis=0).tolist())


def _tasks(items: ItemList, options: PackOptions, means: Means) -> list[ShardTask]:
    per_shard = options.samples_per_shard(means[-1])
    tasks: list[ShardTask] = []
    for split in SPLITS:
        order = items.order(split, options.seed, shuffle=options.shuffle)
        # Equal shards instead of full ones and a rest: the plan's reads stay large.
        for part in np.array_split(order, -(-len(order) // per_shard)) if len(order) else []:
            tasks.append(ShardTask(f"shard-{len(tasks):06d}", split, items.offset[part]))
    return tasks


def _check_space(destination: Path, samples: int, means: Means) -> None:
    need, free = samples * sum(means) * _MARGIN, shutil.disk_usage(destination).free
    if need > free:
        what = f"{destination} has {free / 1e9:.1f} GB free, about {need / 1e9:.1f} GB are needed"
        raise UserError(what, "free some space, choose another disk, a lower --quality, or --format webp")


def _conclude(
    source: Source, folders: tuple[Path, ...], items: ItemList, done: list[ShardDone], note: dict[str, Any]
) -> tuple[tuple[Manifest, ...], Skipped]:
    skipped = tuple(entry for d in done for entry in d.skipped)
    kept = [d for d in done if d.count]
    if not any(d.infos[0].split == "train" for d in kept):
        raise UserError(f"no picture could be read; the first: {', '.join(skipped[0])}", "check the source")
    names = tuple(getattr(source, "class_names", ()))
    classes = max(items.classes, len(names)) if items.classes else 0
    sides = note["resolution"] if isinstance(note["resolution"], list) else [note["resolution"]]
    manifests = []
    for level, (folder, side) in enumerate(zip(folders, sides, strict=True)):
        for d in done:
            if not d.count:
                for end in ("tar", "index"):
                    (folder / f"{d.name}.{end}").unlink(missing_ok=True)
        manifest = Manifest(
            name=source.name,
            license=source.license,
            resolution=side,
            channels=note["channels"],
            image_format=note["format"],
            classes=classes,
            class_names=names if len(names) == classes else (),
            shards=tuple(d.infos[level] for d in kept),
            packing=note,
        )
        if skipped:
            lines = ",\n".join(json.dumps({"key": k, "reason": r}) for k, r in skipped)
            write_atomically(folder / _SKIPPED, f"[\n{lines}\n]\n".encode())
        write_atomically(folder / FILE_NAME, manifest.to_bytes())
        manifests.append(manifest)
    return tuple(manifests), skipped
