"""From positions to batches of pictures: what a decoding process does."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sivae_dist.data import jpeg
from sivae_dist.data.faults import Report
from sivae_dist.data.manifest import Manifest, ShardInfo
from sivae_dist.data.parts import Reads
from sivae_dist.data.replace import Replacing, Tolerance
from sivae_dist.data.shard_read import ShardReader
from sivae_dist.data.slots import Place, Slots, pool_of
from sivae_dist.data.store import Access, open_store
from sivae_dist.data.watch import Watch
from sivae_dist.errors import UserError

# Bytes of encoded pictures that are read before they are decoded. Reading many in a row is quicker, as its code and the
# kernel's stay in the caches; those of a core must also hold the bytes until they are decoded.
_READ_AT_ONCE = 1 << 18


_PACKED = struct.Struct("<qq")  # slot, number of pictures; then their labels, if there are any


@dataclass
class Failure:
    """A UserError instead of a batch: it is raised when the batch is due, other exceptions of a worker, too."""

    what: str
    fix: str


@dataclass
class Decoded:
    """The pictures of a batch. pixels: (B, C, H, W) uint8, channels last as decoders write; label: (B,) int64."""

    pixels: Tensor
    label: Tensor | None
    report: Report | None

    def pin_memory(self) -> Decoded:
        """Page-locked copy."""
        label = None if self.label is None else self.label.pin_memory()
        return Decoded(self.pixels.pin_memory(), label, self.report)


@dataclass
class Made:
    """The same on its way to the training process. pixels: (B, H, W, C) uint8; None where they lie in a slot."""

    place: Place | None
    pixels: npt.NDArray[np.uint8] | None
    shape: tuple[int, int, int, int]
    label: npt.NDArray[np.int64] | None
    report: Report | None

    def pack(self) -> bytes | Made:
        """In a worker: a short message, if there is nothing to tell but where the pixels lie and the labels."""
        if self.place is None or self.report is not None:
            return self
        head = _PACKED.pack(self.place.slot, self.shape[0])
        return head if self.label is None else head + self.label.tobytes()


@dataclass
class Unopened:
    """The bytes of a batch's pictures, row after row, in a slot or here, for `data.device_decode`."""

    sizes: list[int]
    place: Place | None
    data: bytes
    label: npt.NDArray[np.int64] | None
    report: Report | None

    def jpegs(self) -> list[Tensor]:
        """(n,) uint8 each. The slot is free again when all are gone."""
        if self.place is None:
            whole = torch.frombuffer(bytearray(self.data), dtype=torch.uint8)
        else:
            whole = torch.from_numpy(pool_of(self.place).lease(self.place.slot, (sum(self.sizes),)))
        ends = np.cumsum(self.sizes).tolist()
        return [whole[end - size : end] for size, end in zip(self.sizes, ends, strict=True)]


@dataclass(frozen=True)
class Settings:
    """What a worker needs to turn samples into pictures; small, and the same for all workers."""

    url: str
    access: Access
    manifest: Manifest
    shards: tuple[ShardInfo, ...]
    held_out: bool  # what cannot be used is left out instead of replaced
    turbo: bool = False  # decode with data.jpeg
    tolerance: Tolerance = field(default_factory=Tolerance)
    reduce: int = 1
    unopened: bool = False  # deliver the bytes
    at_once: int = 0  # shards that are read by turns

    def shape(self, count: int) -> tuple[int, int, int, int]:
        """(B, H, W, C) of decoded pictures."""
        return count, self.side, self.side, self.manifest.channels

    @property
    def side(self) -> int:
        """Pixels a side of a decoded picture."""
        return self.manifest.resolution // self.reduce

    def sample_bytes(self) -> int:
        """Bytes of a decoded picture."""
        return self.side**2 * self.manifest.channels


class Arrivals:
    """In the training process: what `Pictures.make` made, as tensors, on the slot's own memory if they lie in one.

    Little is called for it, and little of torch: between two batches the caches hold other code, so that a call which
    takes 1 us in a loop takes 10.
    """

    def __init__(self, settings: Settings, slots: Slots | None, *, pinned: bool = False) -> None:
        side, channels = settings.side, settings.manifest.channels
        self._slots, self._labels, self._pinned = slots, settings.manifest.classes > 0, pinned
        self._shape, self._strides = (channels, side, side), (side * side * channels, 1, side * channels, channels)

    def __call__(self, found: bytes | Made | Unopened | Failure) -> Decoded | Unopened | Failure:
        """The pictures, page-locked if that is wanted; all else as it is."""
        label, report = None, None
        if isinstance(found, bytes):
            assert self._slots is not None
            slot, count = _PACKED.unpack_from(found)
            pixels = self._slots.lease(slot, (count, *self._shape), self._strides)
            if self._labels:
                label = torch.frombuffer(bytearray(found), dtype=torch.int64, offset=_PACKED.size)
        elif not isinstance(found, Made):
            return found
        else:
            label = None if found.label is None else torch.from_numpy(found.label)
            report = found.report
            if found.place is not None:
                assert self._slots is not None
                pixels = self._slots.lease(found.place.slot, (found.shape[0], *self._shape), self._strides)
            else:
                assert found.pixels is not None
                pixels = found.pixels.transpose(0, 3, 1, 2)
        done = Decoded(torch.from_numpy(pixels), label, report)
        return done.pin_memory() if self._pinned else done


class Pictures:
    """Reads and decodes whole batches at once. Opens files lazily, in the process that uses them.

    worker: the number of that process, whose slots are used, among those that share them.
    """

    worker: int | None = None

    def __init__(self, settings: Settings, slots: Slots | None = None, watch: Watch | None = None) -> None:
        self.settings, self.slots, self.watch = settings, slots, watch
        self._reader: ShardReader | None = None

    def make(self, reads: Reads) -> Made | Unopened | Failure:
        """The pictures of a batch."""
        place = None
        try:
            if self.settings.unopened:
                return self._unopened(reads)
            place = self._slot(len(reads) * self.settings.sample_bytes())
            return self._batch(reads, place)
        except UserError as error:
            if place is not None and self.slots is not None:
                self.slots.give(place)
            return Failure(error.what, error.fix)

    def _slot(self, size: int) -> Place | None:
        if self.slots is None or not size:
            return None
        return self.slots.take(self.worker or 0, size)

    def _batch(self, reads: Reads, place: Place | None) -> Made:
        s = self.settings
        # Height, width, channels, as decoders write them: turning a picture costs as much as a third of decoding it.
        shape = s.shape(len(reads))
        if place is None or self.slots is None:
            pixels = np.empty(shape, dtype=np.uint8)
            return Made(None, pixels, shape, *self._read(reads, pixels))
        return Made(place, None, shape, *self._read(reads, self.slots.memory(place, shape)))

    def _read(self, reads: Reads, out: npt.NDArray[np.uint8]) -> tuple[npt.NDArray[np.int64] | None, Report | None]:
        """Fills out (B, H, W, C); labels (B,), and what there is to report."""
        s, report, labels = self.settings, None, [0] * len(reads)
        reader = self._opened()
        reader.prepare(reads.shard, reads.number)
        rest: Sequence[int] = range(len(reads))
        if s.turbo:
            decode, reduce = jpeg.decode_into, s.reduce
            rest = self._read_quickly(reader, reads, labels, lambda place, data: decode(data, out[place], reduce))

        def read(place: int, shard: int, number: int) -> int:
            return reader.read_into(shard, number, out[place], turbo=s.turbo, reduce=s.reduce)[1] or 0

        if rest:
            report = Report()
            self._read_plainly(reader, reads, rest, labels, report, read)
        return self._labels(labels), self._told(reader, report)

    def _unopened(self, reads: Reads) -> Unopened:
        """The bytes of pictures that their headers say are as they should be; of others, if the CPU can decode them."""
        s, report, labels = self.settings, None, [0] * len(reads)
        reader, found = self._opened(), [b""] * len(reads)
        reader.prepare(reads.shard, reads.number)

        def keep(place: int, data: bytes) -> bool:
            found[place] = data
            return jpeg.announces(data, s.side, s.manifest.channels)

        def read(place: int, shard: int, number: int) -> int:
            out = np.empty(s.shape(1)[1:], dtype=np.uint8)
            reader.read_into(shard, number, out, turbo=s.turbo)  # raises what is wrong with it
            _, found[place], label = reader.encoded(shard, number)
            return label or 0

        if rest := self._read_quickly(reader, reads, labels, keep):
            report = Report()
            self._read_plainly(reader, reads, rest, labels, report, read)
        sizes = [len(data) for data in found]
        whole, place = b"".join(found), self._slot(sum(sizes))
        if place is not None and self.slots is not None:
            self.slots.memory(place, len(whole))[:] = np.frombuffer(whole, dtype=np.uint8)
            whole = b""
        return Unopened(sizes, place, whole, self._labels(labels), self._told(reader, report))

    def _labels(self, labels: list[int]) -> npt.NDArray[np.int64] | None:
        return np.array(labels, dtype=np.int64) if self.settings.manifest.classes else None  # else some are -1

    @staticmethod
    def _told(reader: ShardReader, report: Report | None) -> Report | None:
        """The report with what the store met; None when there is nothing to tell."""
        events = reader.store.events
        if events.counts or events.notes:
            met, report = events.take(), report or Report()
            report.counts, report.notes = met.counts, met.notes
        return report or None

    def _read_quickly(
        self, reader: ShardReader, reads: Reads, labels: list[int], use: Callable[[int, bytes], bool]
    ) -> list[int]:
        """Reads and uses (row, bytes) what is as it should be; returns which of `reads` are left to the plain way."""
        left, done = [], 0
        while done < len(reads):
            found = reader.several(reads.shard[done:], reads.number[done:], _READ_AT_ONCE)
            for place, sample in zip(reads.place[done:], found, strict=False):
                if sample is None or not use(place, sample[0]):
                    left.append(done)
                else:
                    labels[place] = sample[1]
                done += 1
        return left

    def _read_plainly(
        self,
        reader: ShardReader,
        reads: Reads,
        which: Sequence[int],
        labels: list[int],
        report: Report,
        read: Callable[[int, int, int], int],
    ) -> None:
        """One by one: the reference, which also says what is wrong with a sample and finds another one for its slot.

        read: puts (row, shard, number) where it belongs, and returns its label.
        """
        s, place = self.settings, 0
        replacing = Replacing(reader, s.tolerance, lambda shard, number: read(place, shard, number))
        one = replacing.read_or_leave_out if s.held_out else replacing.read
        for i in which:
            place = reads.place[i]
            labels[place] = one(reads.position[i], reads.shard[i], reads.number[i], report) or 0

    def _opened(self) -> ShardReader:
        if self._reader is None:
            s = self.settings
            self._reader = ShardReader(open_store(s.url, s.access), s.manifest, s.shards, s.at_once)
            if self.watch is not None and self.worker is not None:
                self._reader.on_read = self.watch.teller(self.worker)
        return self._reader

    def close(self) -> None:
        """Closes files."""
        if self._reader is not None:
            self._reader.store.close()
