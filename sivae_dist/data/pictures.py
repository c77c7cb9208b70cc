"""From positions to batches of pictures: what a decoding process does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

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


@dataclass
class Failure:
    """A UserError on its way from a worker: the DataLoader would bury its text in a traceback."""

    what: str
    fix: str


@dataclass
class Decoded:
    """The pictures of a batch. pixels: (B, H, W, C) uint8, as decoders write them; label: (B,) int64 or None."""

    pixels: Tensor
    label: Tensor | None
    report: Report | None

    def pin_memory(self) -> Decoded:
        """Page-locked copy (torch's DataLoader calls this)."""
        label = None if self.label is None else self.label.pin_memory()
        return Decoded(self.pixels.pin_memory(), label, self.report)


@dataclass
class InSlot:
    """The same on its way from a worker: the pixels lie in a slot, and only this message goes through the queue."""

    place: Place
    shape: tuple[int, int, int, int]
    label: npt.NDArray[np.int64] | None
    report: Report | None

    def unpack(self) -> Decoded:
        """In the training process: the pictures, on the slot's own memory."""
        pixels = torch.from_numpy(pool_of(self.place).lease(self.place, self.shape))
        return Decoded(pixels, None if self.label is None else torch.from_numpy(self.label), self.report)

    def pin_memory(self) -> Decoded:
        """Page-locked copy; the slot is free again."""
        return self.unpack().pin_memory()


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
            whole = torch.from_numpy(pool_of(self.place).lease(self.place, (sum(self.sizes),)))
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


class Pictures(Dataset[Decoded]):
    """Reads and decodes whole batches at once. Opens files lazily, in the process that uses them."""

    def __init__(self, settings: Settings, slots: Slots | None = None, watch: Watch | None = None) -> None:
        self.settings, self.slots, self.watch = settings, slots, watch
        self._reader: ShardReader | None = None

    def __getitems__(self, reads: Reads) -> Decoded | InSlot | Unopened | Failure:
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
        info = get_worker_info()
        return self.slots.take(0 if info is None else info.id, size)

    def _batch(self, reads: Reads, place: Place | None) -> Decoded | InSlot:
        s = self.settings
        # Height, width, channels, as decoders write them: turning a picture costs as much as a third of decoding it.
        shape = s.shape(len(reads))
        if place is None or self.slots is None:
            pixels = torch.empty(shape, dtype=torch.uint8)
            label, report = self._read(reads, pixels.numpy())
            return Decoded(pixels, None if label is None else torch.from_numpy(label), report)
        memory = self.slots.memory(place, len(reads) * s.sample_bytes()).reshape(shape)
        label, report = self._read(reads, memory)
        return InSlot(place, shape, label, report)

    def _read(self, reads: Reads, out: npt.NDArray[np.uint8]) -> tuple[npt.NDArray[np.int64] | None, Report | None]:
        """Fills out (B, H, W, C); labels (B,), and what there is to report."""
        s, report, labels = self.settings, Report(), [0] * len(reads)
        reader = self._opened()
        reader.prepare(reads.shard, reads.number)
        rest: Sequence[int] = range(len(reads))
        if s.turbo:
            rest = self._read_quickly(
                reader, reads, labels, lambda place, data: jpeg.decode_into(data, out[place], s.reduce)
            )

        def read(place: int, shard: int, number: int) -> int:
            return reader.read_into(shard, number, out[place], turbo=s.turbo, reduce=s.reduce)[1] or 0

        if rest:
            self._read_plainly(reader, reads, rest, labels, report, read)
        return self._labels(labels), self._told(reader, report)

    def _unopened(self, reads: Reads) -> Unopened:
        """The bytes of pictures that their headers say are as they should be; of others, if the CPU can decode them."""
        s, report, labels = self.settings, Report(), [0] * len(reads)
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
            self._read_plainly(reader, reads, rest, labels, report, read)
        sizes = [len(data) for data in found]
        whole, place = b"".join(found), self._slot(sum(sizes))
        if place is not None and self.slots is not None:
            self.slots.memory(place, len(whole))[:] = np.frombuffer(whole, dtype=np.uint8)
            whole = b""
        return Unopened(sizes, place, whole, self._labels(labels), self._told(reader, report))

    def _labels(self, labels: list[int]) -> npt.NDArray[np.int64] | None:
        return np.array(labels, dtype=np.int64) if self.settings.manifest.classes else None

    @staticmethod
    def _told(reader: ShardReader, report: Report) -> Report | None:
        """The report with what the store met."""
        events = reader.store.events
        if events.counts or events.notes:
            met = events.take()
            report.counts, report.notes = met.counts, met.notes
        return report if report else None

    def _read_quickly(
        self, reader: ShardReader, reads: Reads, labels: list[int], use: Callable[[int, bytes], bool]
    ) -> list[int]:
        """Reads and uses (row, bytes) what is as it should be; returns which of `reads` are left to the plain way."""
        left, done = [], 0
        while done < len(reads):
            found = reader.several(reads.shard[done:], reads.number[done:], _READ_AT_ONCE)
            for which, sample in enumerate(found, done):
                place = reads.place[which]
                if sample is None or not use(place, sample[0]):
                    left.append(which)
                else:
                    labels[place] = max(sample[1], 0)
            done += len(found)
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
            s, info = self.settings, get_worker_info()
            self._reader = ShardReader(open_store(s.url, s.access), s.manifest, s.shards)
            if self.watch is not None and info is not None:
                self._reader.on_read = self.watch.teller(info.id)
        return self._reader

    def close(self) -> None:
        """Closes files."""
        if self._reader is not None:
            self._reader.store.close()
