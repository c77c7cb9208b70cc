"""Time and memory of training, as tags of the reports."""

from __future__ import annotations

import resource
import sys
import time

import torch


class Clock:
    """Time per step, share of it spent waiting for data, and throughput, between two reads.

    Reports, evaluation, pictures and checkpoints are not counted as steps.
    """

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self._steps = self._images = 0
        self._busy = self._waited = 0.0

    def begin(self) -> None:
        """Before asking for the next batch."""
        self._start = time.perf_counter()

    def data_arrived(self) -> None:
        """The batch is there."""
        self._waited += time.perf_counter() - self._start

    def end(self, images: int) -> None:
        """After the iteration over a global batch of `images`."""
        self._busy += time.perf_counter() - self._start
        self._steps += 1
        self._images += images

    def read(self) -> dict[str, float]:
        """The tags `time/...` since the last read."""
        busy, steps, images = max(self._busy, 1e-9), max(self._steps, 1), max(self._images, 1)
        values = {
            "time/step_s": busy / steps,
            "time/data_wait_fraction": self._waited / busy,
            "time/img_per_s": images / busy,
            "time/s_per_kimg": 1000 * busy / images,
        }
        self._reset()
        return values


def memory(device: torch.device) -> dict[str, float]:
    """Peak memory in GiB: of this process on the host, and of its device if that is a GPU."""
    unit = 1 << 30 if sys.platform == "darwin" else 1 << 20  # ru_maxrss counts bytes there, KiB elsewhere
    values = {"mem/cpu_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit}
    if device.type == "cuda":
        values["mem/gpu_gib"] = torch.cuda.max_memory_allocated(device) / (1 << 30)
    return values
