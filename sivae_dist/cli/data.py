"""`sivae-dist data ...`: pack, info, verify."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

from sivae_dist.cli.errors import interrupts_raise
from sivae_dist.data.pack import pack as pack_source
from sivae_dist.data.pack_shard import PackOptions
from sivae_dist.data.shard_read import load_manifest
from sivae_dist.data.sources.folder import FolderSource
from sivae_dist.data.store import open_store
from sivae_dist.data.verify import verify as verify_folder
from sivae_dist.errors import UserError

_SHOWN = 20


def pack(
    src: Path,
    dst: Path,
    /,
    *,
    resolution: int,
    format: Literal["jpg", "webp", "png"] = "jpg",
    quality: int | None = None,
    channels: Literal[1, 3] = 3,
    shard_size: str = "auto",
    val_fraction: float = 0.0,
    val_count: int = 0,
    labels: bool = False,
    seed: int = 0,
    shuffle: bool = True,
    workers: int | None = None,
    name: str = "",
    license: str = "",
) -> None:
    """Pack pictures into shards: upright, centre square, Lanczos to the resolution. Interrupted, run it again.

    Args:
        src: A folder of pictures, sub-folders included.
        dst: The folder to make.
        resolution: Side of the stored pictures in pixels.
        format: How pictures are stored; png is lossless.
        quality: 1 to 100, for jpg and webp; the default is 95.
        channels: 3 for RGB, 1 for grey.
        shard_size: A number of samples (1000), a size (256MB), or auto: 1,024 samples or 256 MB, whichever is less.
        val_fraction: Part of the pictures to hold out for validation, chosen by their names.
        val_count: Number of pictures to hold out, instead of a fraction.
        labels: Take the first sub-folder of each picture as its class.
        seed: Keys the order in which pictures are put into shards.
        shuffle: Put pictures into shards in random order instead of the order of their names.
        workers: Processes; by default one per core. The result does not depend on it.
        name: Name of the data set; by default that of the source folder.
        license: Licence of the pictures, for the record.
    """
    interrupts_raise()  # workers are stopped and unfinished files removed
    options = PackOptions(
        resolution=resolution,
        format=format,
        quality=quality,
        channels=channels,
        shard_size=shard_size,
        val_fraction=val_fraction,
        val_count=val_count,
        seed=seed,
        shuffle=shuffle,
    )
    source = FolderSource(src, name=name, license=license or "unknown", labels=labels)
    report = pack_source(source, dst, options, workers=workers)
    manifest = report.manifest
    count = sum(s.count for s in manifest.shards)
    splits = ", ".join(f"{n} {v['samples']}" for n, v in manifest.splits().items())
    print(f"{dst}: {count} samples ({splits}) in {len(manifest.shards)} shards, {report.seconds:.1f} s")
    if report.reused:
        print(f"{report.reused} shards were finished before")
    if report.enlarged:
        print(f"{report.enlarged} pictures were smaller than {resolution} pixels and were enlarged")
    if report.skipped:
        print(f"{len(report.skipped)} pictures could not be read and were skipped; see {dst}/skipped.json:")
        _print_some([f"{key}: {reason}" for key, reason in report.skipped], 5)


def info(path: str, /) -> None:
    """Show what a shard folder holds.

    Args:
        path: The shard folder.
    """
    manifest = load_manifest(open_store(path))
    kind = "RGB" if manifest.channels == 3 else "grey"
    print(f"{_plain(manifest.name)}: {manifest.resolution}x{manifest.resolution} {kind}, {manifest.image_format}")
    print(f"licence      {_plain(manifest.license)}")
    for name, split in manifest.splits().items():
        mean = split["bytes"] / max(1, split["samples"]) / 1000
        size = f"{split['bytes'] / 1e9:.3f} GB, {mean:.1f} kB a sample"
        print(f"{name:<12} {split['samples']} samples in {split['shards']} shards, {size}")
    if manifest.classes:
        print(f"classes      {manifest.classes}  {_plain(', '.join(manifest.class_names[:_SHOWN]))}")
    packing = ", ".join(f"{k}={v}" for k, v in manifest.packing.items() if k != "items_sha256")
    print(f"packed with  {_plain(packing)}")
    print(f"fingerprint  {manifest.fingerprint}")


def verify(path: str, /, *, workers: int | None = None) -> None:
    """Read everything again: checksums, tar against index, every picture decoded.

    Args:
        path: The shard folder.
        workers: Processes; by default one per core.
    """
    report = verify_folder(path, workers=workers)
    total = sum(s.count for s in report.manifest.shards)
    print(f"{path}: {report.decoded} of {total} samples in {len(report.manifest.shards)} shards are good")
    if report.problems:
        _print_some(list(report.problems), _SHOWN)
        raise UserError(
            f"{path} is damaged: {', '.join(report.damaged[:_SHOWN])}",
            "copy these shards again (.tar and .index), or pack the data set again",
        )


def _plain(text: str) -> str:
    """A stranger's text for the terminal: bounded, and without the control characters that would steer it."""
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text[:1000])


def _print_some(lines: list[str], limit: int) -> None:
    for line in lines[:limit]:
        print(f"  {_plain(line)}")
    if len(lines) > limit:
        print(f"  and {len(lines) - limit} more")


COMMANDS: dict[str, Callable[..., None]] = {"data pack": pack, "data info": info, "data verify": verify}
