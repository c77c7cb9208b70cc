"""What a run tells: metrics.jsonl, TensorBoard and a progress line, all by images seen, all written by rank 0."""

from __future__ import annotations

import json
import os
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sivae_dist.engine.run_folder import RunFolder
from sivae_dist.errors import UserError
from sivae_dist.files import write_atomically
from sivae_dist.progress import Bar

# What the progress line shows behind the bar, where a run reports it.
SHOWN = {
    "time/img_per_s": "{:.1f} img/s",
    "time/s_per_kimg": "{:.1f} s/kimg",
    "loss/encoder": "encoder {:.4g}",
    "loss/decoder": "decoder {:.4g}",
    "loss/joint": "loss {:.4g}",
    "kl/real": "kl real {:.1f}",
    "kl/fake": "fake {:.1f}",
    "eval/psnr": "psnr {:.2f}",
    "eval/hist_kl": "hist kl {:.3f}",
}


@dataclass(frozen=True)
class TrackingConfig:
    """Reports during training."""

    every_kimg: float = 1.0
    """Losses, speeds and memory go to metrics.jsonl and TensorBoard every this many thousand images."""
    images_every_kimg: float = 20.0
    """Picture grids every this many thousand images, and at the end. 0 draws none."""
    images: int = 16
    """Columns of the grids: held-out images with their reconstructions, and samples."""
    fingerprints_every_kimg: float = 50.0
    """Hashes of data, noise, losses, gradients and weights go to fingerprints.jsonl every this many thousand images,
    and after iterations 1, 2, 4, 8, ...: `sivae-dist diff` tells from them where two runs part. 0 writes none."""
    tensorboard: bool = True
    """Write TensorBoard files (metrics.jsonl is always written)."""
    progress: bool = True
    """Show the progress line."""

    def __post_init__(self) -> None:
        if self.every_kimg <= 0 or min(self.images_every_kimg, self.fingerprints_every_kimg) < 0 or self.images < 1:
            raise UserError(
                f"tracking: every_kimg {self.every_kimg}, images_every_kimg {self.images_every_kimg}, "
                f"fingerprints_every_kimg {self.fingerprints_every_kimg}, images {self.images} are not all in range",
                "every_kimg must be positive, the other intervals at least 0, images at least 1",
            )


class Tracker:
    """Writes reports on the main rank; on the others every method does nothing."""

    def __init__(self, config: TrackingConfig, run: RunFolder, *, resumed_nimg: int, is_main: bool) -> None:
        self.active, self.config, self.run = is_main, config, run
        self._writer: Any = None
        if is_main:
            self._open(resumed_nimg if resumed_nimg else -1)

    def rewind(self, nimg: int) -> None:
        """Takes back everything after `nimg`, as on a resume from there."""
        if self.active:
            self.close()
            self._open(nimg)

    def _open(self, nimg: int) -> None:
        # What an earlier life wrote after its last checkpoint is taken back: it will be lived again.
        run = self.run
        cut_back(run.metrics, nimg)
        self._file = open(run.metrics, "a", encoding="utf-8")  # noqa: SIM115 (closed in close)
        if self.config.tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415 (not every run has it)
            except ImportError as error:
                raise UserError(
                    f"tracking.tensorboard is on, but tensorboard cannot be imported: {error}",
                    "pip install tensorboard, or set tracking.tensorboard to False",
                ) from error
            threading.excepthook = _told_elsewhere
            self._writer = SummaryWriter(str(run.tensorboard), purge_step=nimg + 1)

    def scalars(self, nimg: int, values: dict[str, float]) -> None:
        """One line of metrics.jsonl and the same tags in TensorBoard."""
        if not self.active:
            return
        self._file.write(json.dumps({"nimg": nimg, **values}) + "\n")
        self._file.flush()
        if self._writer is not None:
            for tag, value in values.items():
                self._writer.add_scalar(tag, value, nimg)
            self._writer.flush()

    def image(self, nimg: int, tag: str, picture: np.ndarray) -> None:
        """A picture (H, W, 3) uint8 in TensorBoard."""
        if self.active and self._writer is not None:
            self._writer.add_image(tag, picture, nimg, dataformats="HWC")

    def sync(self) -> None:
        """Forces metrics.jsonl to the disk: done with every checkpoint, so that none is ahead of its metrics."""
        if self.active:
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Ends the files."""
        if self.active:
            self._file.close()
            if self._writer is not None:
                self._writer.close()


def _told_elsewhere(hooked: threading.ExceptHookArgs) -> None:
    """TensorBoard's thread raises what it met (a full disk) again in the next call here: no traceback of its own."""
    if not (isinstance(hooked.exc_value, OSError) and type(hooked.thread).__module__.startswith("tensorboard")):
        threading.__excepthook__(hooked)


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The rows of a metrics.jsonl; a last line cut off by a kill is left out."""
    rows: list[dict[str, float]] = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict):
                rows.append(row)
    return rows


def cut_back(path: Path, nimg: int) -> None:
    """Removes the rows after `nimg` (and a torn last line) from a metrics.jsonl, atomically."""
    if not path.is_file():
        return
    kept = [json.dumps(row) + "\n" for row in read_metrics(path) if row.get("nimg", 0) <= nimg]
    write_atomically(path, "".join(kept))


class Progress:
    """One line: kimg done and wanted, images per second, seconds per kimg, time left, the newest losses."""

    def __init__(self, total_nimg: int, nimg: int, *, enabled: bool) -> None:
        bar = "{desc} {percentage:3.0f}%|{bar}| {n:.1f}/{total:.1f} kimg [{elapsed}<{remaining}{postfix}]"
        self._bar = Bar(
            total=total_nimg / 1000,
            initial=nimg / 1000,
            desc="training",
            bar_format=bar,
            disable=not enabled,
            mininterval=0.2 if sys.stderr.isatty() else 10.0,  # a log file wants few lines
            smoothing=0.05,
            dynamic_ncols=True,
        )

    def advance(self, images: int) -> None:
        """After an iteration."""
        left = float(self._bar.total or 0) - float(self._bar.n)  # sums of floats may pass the total
        self._bar.update(min(images / 1000, left))

    def rewind(self, nimg: int) -> None:
        """Back to this many images."""
        self._bar.n = nimg / 1000
        self._bar.refresh()

    def show(self, values: dict[str, float]) -> None:
        """Puts the newest speeds and losses behind the bar."""
        parts = [pattern.format(values[tag]) for tag, pattern in SHOWN.items() if tag in values]
        self._bar.set_postfix_str(", ".join(parts), refresh=False)

    def say(self, text: str) -> None:
        """A line of its own, above the bar."""
        if not self._bar.disable:
            self._bar.write(text, file=sys.stderr)

    def close(self) -> None:
        """Leaves the finished line on the screen."""
        self._bar.close()
