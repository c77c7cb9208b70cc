"""`sivae-dist data scenes`: a data set to begin with, drawn on the spot."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal


def scenes(
    dst: Path,
    /,
    *,
    resolution: int = 64,
    count: int = 4096,
    val_count: int = 256,
    seed: int = 0,
    format: Literal["png", "webp", "jpg"] = "png",
    shard_size: str = "auto",
    workers: int | None = None,
) -> None:
    """Draw landscapes with known factors and pack them: data without a download. Interrupted, run it again.

    The factors of a picture (hour, season, place and colour of the house, ...) lie beside it in the shards; its class
    is the time of day: night, morning, midday or evening.

    Args:
        dst: The folder to make.
        resolution: Side of the pictures in pixels; scene 7 is the same picture at 32 and at 1024.
        count: Number of pictures, the held-out ones included.
        val_count: Number of pictures to hold out for validation, the first ones.
        seed: Another seed draws other scenes.
        format: How pictures are stored; png is lossless.
        shard_size: A number of samples (1000), a size (256MB), or auto: 1,024 samples or 256 MB, whichever is less.
        workers: Processes; by default one per core. The result does not depend on it.
    """
    from sivae_dist.cli.data import processes  # noqa: PLC0415
    from sivae_dist.cli.errors import interrupts_raise  # noqa: PLC0415
    from sivae_dist.data.pack import pack  # noqa: PLC0415 (keeps --help quick)
    from sivae_dist.data.pack_shard import PackOptions  # noqa: PLC0415
    from sivae_dist.data.sources.scenes import ScenesSource  # noqa: PLC0415

    interrupts_raise()  # workers are stopped and unfinished files removed
    source = ScenesSource(count, seed=seed, val_count=val_count)
    options = PackOptions(resolution=resolution, format=format, shard_size=shard_size, seed=seed)
    report = pack(source, dst, options, workers=processes(workers))
    splits = ", ".join(f"{name} {split['samples']}" for name, split in report.manifest.splits().items())
    print(f"{dst}: {count} scenes of {resolution}x{resolution} ({splits}), {report.seconds:.1f} s")
    if report.reused:
        print(f"{report.reused} shards were finished before")


COMMANDS: dict[str, Callable[..., None]] = {"data scenes": scenes}
