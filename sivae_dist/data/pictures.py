"""From positions to batches of pictures: what a decoding process does."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset, get_worker_info

from sivae_dist.data.augment import Augmentation
from sivae_dist.data.base import HostBatch
from sivae_dist.data.faults import Report
from sivae_dist.data.manifest import Manifest, ShardInfo
from sivae_dist.data.plan import Plan
from sivae_dist.data.replace import Replacing, Tolerance
from sivae_dist.data.shard_read import ShardReader
from sivae_dist.data.slots import Place, Slots, pool_of
from sivae_dist.data.store import Access, open_store
from sivae_dist.data.watch import Watch
from sivae_dist.errors import UserError


@dataclass
class Failure:
    """A UserError on its way from a worker: the DataLoader would bury its text in a traceback."""

    what: str
    fix: str


@dataclass
class SharedBatch:
    """A batch on its way from a worker: the pixels lie in a slot, and only this message goes through the queue."""

    place: Place
    shape: tuple[int, int, int, int]  # (B, H, W, C)
    positions: npt.NDArray[np.int64]
    label: npt.NDArray[np.int64] | None
    augmentation: Augmentation | None
    report: Report | None

    def unpack(self) -> HostBatch:
        """In the training process: the batch, on the slot's own memory."""
        size = int(np.prod(self.shape))
        pixels = torch.from_numpy(pool_of(self.place).lease(self.place, size)).view(self.shape)
        return _host_batch(pixels, self.positions, self.label, self.augmentation, self.report)

    def pin_memory(self) -> HostBatch:
        """Page-locked copy (torch's DataLoader calls this); the slot is free again."""
        return self.unpack().pin_memory()


@dataclass(frozen=True)
class Settings:
    """What a worker needs to turn positions into pictures; small, and the same for all workers."""

    url: str
    access: Access
    manifest: Manifest
    shards: tuple[ShardInfo, ...]
    plan: Plan | None  # None: positions are sample numbers in shard order
    augmentation: Augmentation | None
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


class Pictures(Dataset[HostBatch]):
    """Decodes lists of positions, whole batches at once. Opens files lazily, in the process that uses them."""

    def __init__(self, settings: Settings, slots: Slots | None = None, watch: Watch | None = None) -> None:
        self.settings, self.slots, self.watch = settings, slots, watch
        self._reader: ShardReader | None = None
        self._ends = np.cumsum([s.count for s in settings.shards])

    def __getitems__(self, positions: list[int]) -> HostBatch | SharedBatch | Failure:
        place = self._slot(len(positions))
        try:
            return self._batch(np.asarray(positions, dtype=np.int64), place)
        except UserError as error:
            if place is not None and self.slots is not None:
                self.slots.give(place)
            return Failure(error.what, error.fix)

    def _slot(self, count: int) -> Place | None:
        if self.slots is None or not count:
            return None
        info = get_worker_info()
        return self.slots.take(0 if info is None else info.id, count * self.settings.sample_bytes())

    def _batch(self, positions: npt.NDArray[np.int64], place: Place | None) -> HostBatch | SharedBatch:
        s = self.settings
        if s.plan is not None:
            shard, number = s.plan.locate(positions)
        else:
            shard = np.searchsorted(self._ends, positions, side="right")
            number = positions - (self._ends - [i.count for i in s.shards])[shard]
        # Height, width, channels, as decoders write them: turning a picture costs as much as a third of decoding it.
        shape = (len(positions), s.side, s.side, s.manifest.channels)
        if place is None or self.slots is None:
            pixels = torch.empty(shape, dtype=torch.uint8)
            label, report = self._read(positions, shard, number, pixels.numpy())
            if s.plan is None and report is not None and report.faults:
                return _without_faults(_host_batch(pixels, positions, label, s.augmentation, report), report)
            return _host_batch(pixels, positions, label, s.augmentation, report)
        memory = self.slots.memory(place, len(positions) * s.sample_bytes()).reshape(shape)
        label, report = self._read(positions, shard, number, memory)
        return SharedBatch(place, shape, positions, label, s.augmentation, report)

    def _read(
        self,
        positions: npt.NDArray[np.int64],
        shard: npt.NDArray[np.int64],
        number: npt.NDArray[np.int64],
        out: npt.NDArray[np.uint8],
    ) -> tuple[npt.NDArray[np.int64] | None, Report | None]:
        """Fills out (B, H, W, C); labels (B,), and what there is to report.

        Reads shard by shard and forwards, which disks and caches like.
        """
        s, report, labels = self.settings, Report(), np.zeros(len(shard), dtype=np.int64)
        reader, place = self._opened(), 0
        reader.prepare(shard, number)

        def read(shard: int, number: int) -> int:
            return reader.read_into(shard, number, out[place], turbo=s.turbo, reduce=s.reduce)[1] or 0

        replacing = Replacing(reader, s.tolerance, read)
        for place in np.lexsort((number, shard)).tolist():
            where = int(positions[place]), int(shard[place]), int(number[place])
            if s.plan is not None:
                labels[place] = replacing.read(*where, report)
            else:
                labels[place] = replacing.read_or_leave_out(*where, report) or 0
        met = reader.store.events.take()
        report.counts, report.notes = met.counts, met.notes
        return labels if s.manifest.classes else None, report if report else None

    def _opened(self) -> ShardReader:
        if self._reader is None:
            s, info = self.settings, get_worker_info()
            self._reader = ShardReader(open_store(s.url, s.access), s.manifest, s.shards)
            if self.watch is not None and info is not None:
                self._reader.on_read = functools.partial(self.watch.tell, info.id)
        return self._reader

    def close(self) -> None:
        """Closes files."""
        if self._reader is not None:
            self._reader.store.close()


def _host_batch(
    pixels: torch.Tensor,
    positions: npt.NDArray[np.int64],
    label: npt.NDArray[np.int64] | None,
    augmentation: Augmentation | None,
    report: Report | None,
) -> HostBatch:
    drawn = None if augmentation is None else augmentation.draw(positions)
    labels = None if label is None else torch.from_numpy(label)
    return HostBatch(pixels.permute(0, 3, 1, 2), torch.from_numpy(positions), labels, drawn, report)


def _without_faults(batch: HostBatch, report: Report) -> HostBatch:
    """Held-out pictures have no replacements: one of them would count twice in what is measured."""
    lost = torch.tensor([fault.position for fault in report.faults])
    good = ~torch.isin(batch.position, lost)
    label = None if batch.label is None else batch.label[good]
    return HostBatch(batch.data[good], batch.position[good], label, None, report)
