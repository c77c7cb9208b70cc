"""What a data source gives the engine: batches found by position, and nothing else to remember.

The state of the data is one integer, the number of images served to all ranks together (nimg), plus the plan's salt.
`Stream.batches(start, size)` begins anywhere in constant time, so resuming is calling it with another start.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from sivae_dist.data.augment import Drawn
from sivae_dist.data.faults import Report

SLICE_BYTES = 64 << 20  # of floating point numbers, when pictures are averaged down; at least one picture


@dataclass
class Batch:
    """This rank's part of one global batch, on the model's device.

    x:        (B, *sample_shape) floating point, in the model's input range
    position: (B,) int64, global position in the stream; keys all random draws of these samples
    label:    (B,) int64, or None where the data have none
    place:    `position` on the host, where it came from there: reading it waits for no device
    """

    x: Tensor
    position: Tensor
    label: Tensor | None = None
    place: Tensor | None = None

    def __len__(self) -> int:
        return len(self.x)


@dataclass
class HostBatch:
    """A batch as the loader yields it: bytes on the host, turned into a Batch on the device.

    data:     (B, C, H, W) uint8, 0..255, in any layout; or floating point of any shape, passed on unchanged (points)
    position: (B,) int64; may be empty when this rank owns no sample of the global batch
    augment:  random changes that `to` makes to the pictures, or None
    report:   what reading it met (faults, attempts), or None
    """

    data: Tensor
    position: Tensor
    label: Tensor | None = None
    augment: Drawn | None = None
    report: Report | None = None

    def pin_memory(self) -> HostBatch:
        """Page-locked copy, so that `to` overlaps with computation."""
        label = None if self.label is None else self.label.pin_memory()
        augment = None if self.augment is None else self.augment.pin_memory()
        return HostBatch(self.data.pin_memory(), self.position.pin_memory(), label, augment, self.report)

    def on(self, device: torch.device) -> HostBatch:
        """The same with its bytes on a device; positions stay, as the host asks for them once more."""
        label = None if self.label is None else self.label.to(device, non_blocking=True)
        augment = None if self.augment is None else self.augment.on(device)
        return HostBatch(self.data.to(device, non_blocking=True), self.position, label, augment, self.report)

    def tensors(self) -> list[Tensor]:
        """All that `on` moves."""
        a = self.augment
        drawn = [] if a is None else [a.mirror, a.shift, a.hue]
        return [t for t in (self.data, self.label, *drawn) if t is not None]

    def to(
        self,
        device: torch.device,
        input_range: tuple[float, float] | None,
        *,
        dtype: torch.dtype = torch.float32,
        memory_format: torch.memory_format = torch.contiguous_format,
        size: int | None = None,
        slice_bytes: int | None = SLICE_BYTES,
    ) -> Batch:
        """Moves the bytes, then augments and scales 0..255 to `input_range` there: a quarter of the traffic.

        size: pixels a side to which pictures are then averaged down, some of them at a time: so many bytes of numbers
        at the size of the data never lie there all at once. The result is the same for all slice_bytes; None: in one
        piece, which is the reference.
        """
        label = None if self.label is None else self.label.to(device, non_blocking=True)
        position = self.position.to(device, non_blocking=True)

        def pictures(rows: slice) -> Tensor:
            return self._pictures(rows, device, input_range, dtype, memory_format)

        whole = slice(0, len(self.data))
        if size is None or self.data.dim() != 4 or self.data.shape[-1] == size:
            return Batch(pictures(whole), position, label, self.position)
        if slice_bytes is None:
            return Batch(resized(pictures(whole), size), position, label, self.position)
        shape = (*self.data.shape[:2], size, size)
        x = torch.empty(shape, dtype=dtype, device=device, memory_format=memory_format)
        step = max(1, slice_bytes // (self.data[:1].numel() * dtype.itemsize or 1))
        for start in range(0, len(x), step):
            rows = slice(start, start + step)
            x[rows] = resized(pictures(rows), size)
        return Batch(x, position, label, self.position)

    def _pictures(
        self,
        rows: slice,
        device: torch.device,
        input_range: tuple[float, float] | None,
        dtype: torch.dtype,
        memory_format: torch.memory_format,
    ) -> Tensor:
        """Some of them on the device, augmented and scaled."""
        augment = None if self.augment is None else self.augment.part(rows)
        x = self.data[rows].to(device, non_blocking=True)
        if augment is not None:
            x = augment.move(x)
        if not x.is_floating_point():
            low, high = input_range or (0.0, 1.0)
            # In one pass to the number format and to the layout of the model: pictures come channels last.
            x = x.to(dtype, memory_format=memory_format if x.dim() == 4 else torch.preserve_format)
            x = x.mul_((high - low) / 255.0).add_(low) if (low, high) != (0.0, 1.0) else x.div_(255.0)
        x = x.to(dtype)
        if augment is not None:
            x = augment.colour(x)
        return x.contiguous(memory_format=memory_format) if x.dim() == 4 else x


def resized(x: Tensor, size: int) -> Tensor:
    """Images (B, C, H, W) area-averaged to `size` pixels a side, a whole fraction of H; unchanged at that size."""
    return x if x.shape[-1] == size else functional.avg_pool2d(x, x.shape[-1] // size)


class Stream(Protocol):
    """A resumable, rank-aware source of batches."""

    sample_shape: tuple[int, ...]
    epoch_size: int
    classes: int  # number of label classes, 0 without labels
    fingerprint: str  # hash of the data manifest; stored in the run, compared on resume and across ranks
    held_out_split: str  # name of the split that held_out() serves

    def batches(self, start: int, size: int | Callable[[int], int]) -> Iterator[HostBatch]:
        """Endless: this rank's samples of the global batches [start, start+size), [start+size, start+2 size), ...

        size: of all batches, or a function of the position where a batch starts.
        """
        ...

    def held_out(self, limit: int, batch: int) -> list[HostBatch]:
        """This rank's share of the first `limit` samples to evaluate on: fixed order, batches of `batch`, unmirrored.

        The union over ranks is exactly the first `limit` (or all) samples of the validation split. Data without one
        give training samples; `held_out_split` says which split it is.
        """
        ...

    def close(self) -> None:
        """Ends worker processes and closes files."""
        ...


@dataclass(frozen=True)
class DataConfig:
    """Base of every dataset's configuration; `name` selects the class."""

    name: str = ""

    def check(self) -> None:
        """Looks at what can be told before anything is built. Raises UserError; writes nothing, asks no server."""

    def at(self, sample_shape: tuple[int, ...]) -> DataConfig:
        """The data for a model of samples (C, H, W): of a pyramid its resolution, all other data as they are."""
        return self

    def build(self, *, seed: int, salt: int, rank: int, ranks: int) -> Stream:
        """seed, salt: key the plan's permutations; a changed salt gives other batches for the same position."""
        raise NotImplementedError

    def losses_allowed(self, nimg: int, epoch_size: int) -> float:
        """How many slots may have got another sample than theirs, after nimg images."""
        return 0.0
