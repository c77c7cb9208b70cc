"""Time and memory of training, as tags of the reports."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class Clock:
    """Time per step, share of it spent waiting for data, and throughput, between two reads; and what training took.

    Reports, evaluation, pictures and checkpoints are not counted as steps. The totals go on where a checkpoint left
    them, so that they are what the weights at hand have cost: iterations that a rollback took back do not count.
    """

    def __init__(self) -> None:
        self._train_s = self._cpu_s = 0.0
        self._known = True  # whether the totals count from the first image
        self._reset()

    def _reset(self) -> None:
        self._steps = self._images = 0
        self._busy = self._waited = 0.0

    def begin(self) -> None:
        """Before asking for the next batch."""
        self._start, self._cpu_start = time.perf_counter(), time.process_time()

    def data_arrived(self) -> None:
        """The batch is there."""
        self._waited += time.perf_counter() - self._start

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Within, later in the iteration, the next batch is asked for."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self._waited += time.perf_counter() - begin

    def end(self, images: int) -> None:
        """After the iteration over a global batch of `images`."""
        busy = time.perf_counter() - self._start
        self._busy += busy
        self._train_s += busy
        self._cpu_s += time.process_time() - self._cpu_start
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

    def totals(self) -> dict[str, float]:
        """time/train_s, time/cpu_s: seconds that the iterations so far took, and of this process' CPU time in them.

        CPU time is that of all threads of this process, not of the processes that read data (data.workers) and not of
        other ranks. Empty when the run goes on from a checkpoint that does not tell.
        """
        return {"time/train_s": self._train_s, "time/cpu_s": self._cpu_s} if self._known else {}

    def state(self) -> dict[str, float]:
        """For a checkpoint."""
        return {"train_s": self._train_s, "cpu_s": self._cpu_s} if self._known else {}

    def load(self, state: dict[str, Any], nimg: int) -> None:
        """Takes up the totals of a checkpoint at `nimg` images."""
        self._known = nimg == 0 or {"train_s", "cpu_s"} <= state.keys()
        self._train_s, self._cpu_s = float(state.get("train_s", 0.0)), float(state.get("cpu_s", 0.0))


def memory(device: torch.device) -> dict[str, float]:
    """Peak memory in GiB: of this process on the host, and of its device if that is a GPU."""
    unit = 1 << 30 if sys.platform == "darwin" else 1 << 20  # ru_maxrss counts bytes there, KiB elsewhere
    values = {"mem/cpu_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit}
    if device.type == "cuda":
        values["mem/gpu_gib"] = torch.cuda.max_memory_allocated(device) / (1 << 30)
    return values
