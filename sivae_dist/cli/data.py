"""`sivae-dist data ...`: pack, info, verify."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from sivae_dist.cli.errors import interrupts_raise
from sivae_dist.data.manifest import Manifest
from sivae_dist.data.pack import PackReport
from sivae_dist.data.pack import pack as pack_source
from sivae_dist.data.pack_shard import PackOptions
from sivae_dist.data.pyramid import addresses_of, disagreements
from sivae_dist.data.shard_read import load_manifest
from sivae_dist.data.sources.base import Recipe, Source
from sivae_dist.data.sources.listed import ListedSplit
from sivae_dist.data.store import open_store
from sivae_dist.data.verify import verify as verify_folder
from sivae_dist.errors import UserError
from sivae_dist.files import size_of
from sivae_dist.registry import component

_SHOWN = 20
_MOST_WORKERS = 4096
_NUMBER = re.compile(r"-?[0-9]{1,9}")
_NUMBERS = re.compile(r"'[^']*'|\d+")  # what differs between two pictures of one fault


def pack(
    src: Path,
    dst: Path | None = None,
    /,
    *,
    resolution: str,
    recipe: str = "",
    root: Path | None = None,
    format: Literal["jpg", "webp", "png"] = "jpg",
    quality: int | None = None,
    channels: Literal[1, 3] = 3,
    shard_size: str = "auto",
    val_fraction: float = 0.0,
    val_count: int = 0,
    val_list: Path | None = None,
    labels: bool = False,
    attribute: str = "",
    partial: bool = False,
    seed: int = 0,
    shuffle: bool = True,
    workers: int | None = None,
    name: str = "",
    license: str = "",
) -> None:
    """Pack pictures into shards: upright, centre square, Lanczos to the resolution. Interrupted, run it again.

    Args:
        src: What to pack: a folder of pictures, sub-folders included, or a zip. With --root: the folder to make.
        dst: The folder to make.
        resolution: Side of the stored pictures in pixels; several (256,512,1024) make a pyramid, a sub-folder each.
        recipe: What kind of data set it is: folder (the default), zip (the default for a file), ffhq, celebahq.
        root: Where the data set lies, in place of the first path.
        format: How pictures are stored; png is lossless.
        quality: 1 to 100, for jpg and webp; the default is 95.
        channels: 3 for RGB, 1 for grey.
        shard_size: A number of samples (1000), a size (256MB), or auto: 1,024 samples or 256 MB, whichever is less.
        val_fraction: Part of the pictures to hold out for validation, chosen by their names.
        val_count: Number of pictures to hold out, instead of a fraction.
        val_list: A text file with the names of the pictures to hold out, one a line; replaces the recipe's own split.
        labels: Take the first sub-folder of each picture as its class; of a zip its dataset.json, if it has labels.
        attribute: The attribute of CelebA-HQ that makes two classes, for example Smiling.
        partial: Pack a published data set although pictures are missing.
        seed: Keys the order in which pictures are put into shards.
        shuffle: Put pictures into shards in random order instead of the order of their names.
        workers: Processes; by default one per core. The result does not depend on it.
        name: Name of the data set; by default that of the source folder.
        license: Licence of the pictures, for the record.
    """
    interrupts_raise()  # workers are stopped and unfinished files removed
    if (root is None) == (dst is None):
        what = "two places are needed: what to pack, and the folder to make"
        raise UserError(what, "sivae-dist data pack PICTURES DESTINATION, or --recipe NAME --root ROOT DESTINATION")
    place, destination = (src, dst) if dst is not None else (root, src)
    assert place is not None
    options = PackOptions(
        resolution=_resolutions(resolution),
        format=format,
        quality=quality,
        channels=channels,
        shard_size=shard_size,
        val_fraction=val_fraction,
        val_count=val_count,
        seed=seed,
        shuffle=shuffle,
    )
    recipe = recipe or ("zip" if place.is_file() else "folder")
    kind = component("sivae_dist.data.sources", Recipe, recipe, kind="recipe")
    chosen = kind(root=place, title=name, license=license, labels=labels, attribute=attribute, partial=partial)
    source: Source = chosen.build()
    if val_list is not None:
        source = ListedSplit(source, val_list)
    report = pack_source(source, destination, options, workers=processes(workers))
    _tell(report, destination, options)


def processes(workers: int | None) -> int | None:
    """--workers, checked. Raises UserError."""
    if workers is not None and not 0 <= workers <= _MOST_WORKERS:
        raise UserError(f"workers is {workers}, expected 0 to {_MOST_WORKERS}", "correct --workers")
    return workers


def _resolutions(text: str) -> int | tuple[int, ...]:
    parts = [part.strip() for part in text.split(",")]
    if not all(_NUMBER.fullmatch(part) for part in parts):
        raise UserError(f"resolution is {text!r:.80}, expected pixels", "give 256, or 256,512,1024 for a pyramid")
    return tuple(sorted(map(int, parts))) if len(parts) > 1 else int(parts[0])


def _tell(report: PackReport, destination: Path, options: PackOptions) -> None:
    for manifest, folder in zip(report.manifests, options.folders(destination), strict=True):
        count = sum(s.count for s in manifest.shards)
        splits = ", ".join(f"{n} {v['samples']}" for n, v in manifest.splits().items())
        size = size_of(sum(s.bytes for s in manifest.shards))
        print(f"{folder}: {count} samples ({splits}) in {len(manifest.shards)} shards, {size}")
    print(f"took {report.seconds:.1f} s")
    if report.reused:
        print(f"{report.reused} shards were finished before")
    if report.enlarged:
        side = options.resolutions[-1]
        print(f"{report.enlarged} pictures were smaller than {side} pixels and were enlarged")
    if report.skipped:
        where = options.folders(destination)[0] / "skipped.json"
        print(f"{len(report.skipped)} pictures could not be read and were skipped; see {where}:")
        kinds = Counter(_NUMBERS.sub("N", reason) for _, reason in report.skipped)
        examples = {_NUMBERS.sub("N", reason): key for key, reason in reversed(report.skipped)}
        _print_some([f"{n} x {kind}, for example {examples[kind]}" for kind, n in kinds.most_common()], _SHOWN)


def info(path: str, /) -> None:
    """Show what a shard folder or a pyramid of them holds.

    Args:
        path: The shard folder, or the folder of a pyramid.
    """
    levels = addresses_of(path)
    if levels:
        manifests = [load_manifest(open_store(folder)) for folder in levels]
        for folder, manifest in zip(levels, manifests, strict=True):
            splits = ", ".join(f"{n} {v['samples']}" for n, v in manifest.splits().items())
            size = size_of(sum(s.bytes for s in manifest.shards))
            shards = f"{len(manifest.shards)} shards, {size}"
            name = folder.partition("?")[0].rpartition("/")[2]
            print(f"{_plain(name):<8} {manifest.resolution}x{manifest.resolution}: {splits} in {shards}")
        print("the largest:")
        _print_info(max(manifests, key=lambda m: m.resolution))
    else:
        _print_info(load_manifest(open_store(path)))


def _print_info(manifest: Manifest) -> None:
    kind = "RGB" if manifest.channels == 3 else "grey"
    print(f"{_plain(manifest.name)}: {manifest.resolution}x{manifest.resolution} {kind}, {manifest.image_format}")
    print(f"licence      {_plain(manifest.license)}")
    for name, split in manifest.splits().items():
        mean = split["bytes"] / max(1, split["samples"]) / 1000
        size = f"{size_of(split['bytes'])}, {mean:.1f} kB a sample"
        print(f"{name:<12} {split['samples']} samples in {split['shards']} shards, {size}")
    if manifest.classes:
        print(f"classes      {manifest.classes}  {_plain(', '.join(manifest.class_names[:_SHOWN]))}")
    packing = ", ".join(f"{k}={v}" for k, v in manifest.packing.items() if k != "items_sha256")
    print(f"packed with  {_plain(packing)}")
    print(f"fingerprint  {manifest.fingerprint}")


def verify(path: str, /, *, workers: int | None = None) -> None:
    """Read everything again: checksums, tar against index, every picture decoded.

    Args:
        path: The shard folder, or the folder of a pyramid.
        workers: Processes; by default one per core.
    """
    workers = processes(workers)
    levels = addresses_of(path)
    for folder in levels or (path,):
        report = verify_folder(folder, workers=workers)
        total = sum(s.count for s in report.manifest.shards)
        print(f"{folder}: {report.decoded} of {total} samples in {len(report.manifest.shards)} shards are good")
        if report.problems:
            _print_some(list(report.problems), _SHOWN)
            raise UserError(
                f"{folder} is damaged: {', '.join(report.damaged[:_SHOWN])}",
                "copy these shards again (.tar and .index), or pack the data set again",
            )
    if levels and (problems := disagreements(levels)):
        _print_some(problems, _SHOWN)
        raise UserError(f"the resolutions of {path} do not hold the same samples", "pack the data set again")


def _plain(text: str) -> str:
    """A stranger's text for the terminal: bounded, and without the control characters that would steer it."""
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text[:1000])


def _print_some(lines: list[str], limit: int) -> None:
    for line in lines[:limit]:
        print(f"  {_plain(line)}")
    if len(lines) > limit:
        print(f"  and {len(lines) - limit} more")


COMMANDS: dict[str, Callable[..., None]] = {"data pack": pack, "data info": info, "data verify": verify}
