"""From positions to batches of pictures: what a decoding process does."""

from __future__ import annotations

from collections.abc import Sequence
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

    @property
    def side(self) -> int:
        """Pixels a side of a decoded picture."""
        return self.manifest.resolution // self.reduce

    def sample_bytes(self) -> int:
        """Bytes of a decoded picture."""
        return self.side**2 * self.manifest.channels


class Pictures(Dataset[Decoded]):
    """Decodes whole batches at once. Opens files lazily, in the process that uses them."""

    def __init__(self, settings: Settings, slots: Slots | None = None, watch: Watch | None = None) -> None:
        self.settings, self.slots, self.watch = settings, slots, watch
        self._reader: ShardReader | None = None

    def __getitems__(self, reads: Reads) -> Decoded | InSlot | Failure:
        place = self._slot(len(reads))
        try:
            return self._batch(reads, place)
        except UserError as error:
            if place is not None and self.slots is not None:
                self.slots.give(place)
            return Failure(error.what, error.fix)

    def _slot(self, count: int) -> Place | None:
        if self.slots is None or not count:
            return None
        info = get_worker_info()
        return self.slots.take(0 if info is None else info.id, count * self.settings.sample_bytes())

    def _batch(self, reads: Reads, place: Place | None) -> Decoded | InSlot:
        s = self.settings
        # Height, width, channels, as decoders write them: turning a picture costs as much as a third of decoding it.
        shape = (len(reads), s.side, s.side, s.manifest.channels)
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
            rest = self._read_quickly(reader, reads, out, labels)
        if rest:
            self._read_plainly(reader, reads, rest, out, labels, report)
        events = reader.store.events
        if events.counts or events.notes:
            met = events.take()
            report.counts, report.notes = met.counts, met.notes
        return np.array(labels, dtype=np.int64) if s.manifest.classes else None, report if report else None

    def _read_quickly(
        self, reader: ShardReader, reads: Reads, out: npt.NDArray[np.uint8], labels: list[int]
    ) -> list[int]:
        """Reads and decodes what is as it should be; returns which of `reads` are left to the plain way."""
        left, done, reduce = [], 0, self.settings.reduce
        while done < len(reads):
            found = reader.several(reads.shard[done:], reads.number[done:], _READ_AT_ONCE)
            for which, sample in enumerate(found, done):
                place = reads.place[which]
                if sample is None or not jpeg.decode_into(sample[0], out[place], reduce):
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
        out: npt.NDArray[np.uint8],
        labels: list[int],
        report: Report,
    ) -> None:
        """One by one: the reference, which also says what is wrong with a sample and finds another one for its slot."""
        s, place = self.settings, 0

        def read(shard: int, number: int) -> int:
            return reader.read_into(shard, number, out[place], turbo=s.turbo, reduce=s.reduce)[1] or 0

        replacing = Replacing(reader, s.tolerance, read)
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
