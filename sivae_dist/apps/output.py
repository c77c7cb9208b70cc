"""Files that the tools write: never over existing ones unasked, never half done."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from sivae_dist.errors import UserError
from sivae_dist.evaluation.grids import Pixels, save_png

VIDEO_SIDE = 256  # smaller pictures are enlarged by a whole factor to this, or players show a stamp


def claim(path: Path, *, force: bool, suffixes: tuple[str, ...], folder: bool = False) -> Path:
    """The path if it may be written: one of these suffixes (or none, for a folder), and nothing there yet.

    Called before any work. Raises UserError.
    """
    kinds = ", ".join([*suffixes, *(["a folder (no suffix)"] if folder else [])])
    suffix = path.suffix.lower()
    if suffix not in suffixes and (suffix or not folder):
        raise UserError(f"--out {path} has the ending {suffix or '(none)'!r}, expected {kinds}", "give another --out")
    taken = any(path.iterdir()) if path.is_dir() and not suffix else path.exists()
    if path.exists() and path.is_dir() == bool(suffix):
        what = "a folder" if path.is_dir() else "a file"
        raise UserError(f"--out {path} is {what} already", "give another --out")
    if taken and not force:
        raise UserError(f"--out {path} is there already", "give another --out, or --force to write over it")
    if path.absolute().parent.exists() and not path.absolute().parent.is_dir():
        raise UserError(f"{path.absolute().parent} is no folder", "give another --out")
    return path


def write_aside(path: Path, write: Callable[[Path], object]) -> None:
    """Calls write(a path beside, of the same ending), syncs and renames: readers see the old file or all of the new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{uuid.uuid4().hex}{path.suffix}")
    try:
        write(aside)
        with open(aside, "rb") as file:
            os.fsync(file.fileno())
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def write_frames(path: Path, frames: Iterable[Pixels], *, fps: float) -> None:
    """Frames (H, W, 3) of one size as .mp4 (H.264), .gif, or, without an ending, a folder of PNG files."""
    suffix = path.suffix.lower()
    if suffix == ".mp4":
        write_aside(path, lambda aside: _mp4(aside, frames, fps))
    elif suffix == ".gif":
        write_aside(path, lambda aside: _gif(aside, frames, fps))
    else:
        for i, frame in enumerate(frames):
            save_png(path / f"frame-{i:05d}.png", frame)


def require_video() -> None:
    """Raises UserError when what writes .mp4 is not installed."""
    try:
        import imageio_ffmpeg  # noqa: PLC0415, F401 (optional)
    except ImportError:
        raise UserError(
            ".mp4 needs the package imageio-ffmpeg, which is not installed",
            "pip install 'sivae-dist[video]', or give --out an ending .gif or .png, or none for a folder",
        ) from None


def _mp4(path: Path, frames: Iterable[Pixels], fps: float) -> None:
    import imageio_ffmpeg  # noqa: PLC0415 (optional)

    writer = None
    try:
        for frame in frames:
            even = _enlarged(frame)
            if writer is None:
                writer = imageio_ffmpeg.write_frames(
                    str(path),
                    (even.shape[1], even.shape[0]),
                    fps=fps,
                    codec="libx264",
                    quality=None,
                    macro_block_size=2,
                    output_params=["-crf", "16", "-movflags", "+faststart"],
                    ffmpeg_log_level="error",
                )
                writer.send(None)
            writer.send(np.ascontiguousarray(even))
    except OSError as error:  # the library's word for whatever ffmpeg says
        if error.errno is not None:
            raise
        raise UserError(f"ffmpeg cannot write {path.name}: {str(error)[-300:]}", "give --out an ending .gif") from None
    finally:
        if writer is not None:
            writer.close()


def _gif(path: Path, frames: Iterable[Pixels], fps: float) -> None:
    pictures = [Image.fromarray(_enlarged(frame)) for frame in frames]
    duration = max(20, 10 * round(100 / fps))  # the format counts hundredths, and viewers slow down below two
    pictures[0].save(path, "GIF", save_all=True, append_images=pictures[1:], duration=duration, loop=0, optimize=False)


def _enlarged(frame: Pixels) -> Pixels:
    """At least VIDEO_SIDE pixels, by a whole factor, and even sides, which H.264 wants (the last line is repeated)."""
    factor = max(1, -(-VIDEO_SIDE // max(frame.shape[:2])))
    large = frame.repeat(factor, axis=0).repeat(factor, axis=1)
    return np.pad(large, ((0, large.shape[0] % 2), (0, large.shape[1] % 2), (0, 0)), mode="edge")
