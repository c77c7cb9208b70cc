"""The way of a batch to the device while the device still works on the one before."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from sivae_dist.data.base import HostBatch


class DevicePrefetcher(Iterator[HostBatch]):
    """The batches of a stream, unchanged and in order; with `early` they come with their bytes on the device already.

    `ahead`, called when the work on a batch is on its way, asks for the next one and, on a CUDA device, begins its copy
    on a stream of its own; the stream that takes it over by `next` waits for that copy, and for nothing else. Whatever
    goes wrong ahead is raised by `next`, when its turn comes. Without `early`, the default on other devices, `ahead`
    does nothing and `next` passes on what the stream gives: that is the reference.
    """

    def __init__(self, batches: Iterator[HostBatch], device: torch.device, *, early: bool | None = None) -> None:
        self._batches, self._device = batches, device
        self.early = device.type == "cuda" if early is None else early
        self._side: torch.cuda.Stream | None = None
        if self.early and device.type == "cuda":
            self._side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._ready: HostBatch | Exception | None = None

    def ahead(self) -> None:
        """Gets the next batch on its way, once."""
        if not self.early or self._ready is not None:
            return
        try:
            with torch.cuda.stream(self._side):  # without one, this is no stream's business
                self._ready = next(self._batches).on(self._device)  # data.decode gpu decodes in `next`
        except Exception as error:
            self._ready = error

    def __next__(self) -> HostBatch:
        if not self.early:
            return next(self._batches)
        self.ahead()
        ready, self._ready = self._ready, None
        if isinstance(ready, Exception):
            raise ready
        assert ready is not None
        if self._side is not None:
            using = torch.cuda.current_stream(self._device)
            using.wait_stream(self._side)
            for tensor in ready.tensors():
                tensor.record_stream(using)  # else the side stream could use its memory again too soon
        return ready
