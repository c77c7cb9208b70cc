"""From positions to batches of pictures: what a decoding process does."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset, get_worker_info

from sivae_dist.data.augment import Augmentation
from sivae_dist.data.base import HostBatch
from sivae_dist.data.manifest import Manifest, ShardInfo
from sivae_dist.data.plan import Plan
from sivae_dist.data.shard_read import ShardReader
from sivae_dist.data.slots import Place, Slots, pool_of
from sivae_dist.data.store import Access, open_store
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

    def unpack(self) -> HostBatch:
        """In the training process: the batch, on the slot's own memory."""
        size = int(np.prod(self.shape))
        pixels = torch.from_numpy(pool_of(self.place).lease(self.place, size)).view(self.shape)
        return _host_batch(pixels, self.positions, self.label, self.augmentation)

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

    def sample_bytes(self) -> int:
        """Bytes of a decoded picture."""
        return self.manifest.resolution**2 * self.manifest.channels


class Pictures(Dataset[HostBatch]):
    """Decodes lists of positions, whole batches at once. Opens files lazily, in the process that uses them."""

    def __init__(self, settings: Settings, slots: Slots | None = None) -> None:
        self.settings, self.slots = settings, slots
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
        shape = (len(positions), s.manifest.resolution, s.manifest.resolution, s.manifest.channels)
        if place is None or self.slots is None:
            pixels = torch.empty(shape, dtype=torch.uint8)
            label = self._read(shard, number, pixels.numpy())
            return _host_batch(pixels, positions, label, s.augmentation)
        memory = self.slots.memory(place, len(positions) * s.sample_bytes()).reshape(shape)
        return SharedBatch(place, shape, positions, self._read(shard, number, memory), s.augmentation)

    def _read(
        self, shard: npt.NDArray[np.int64], number: npt.NDArray[np.int64], out: npt.NDArray[np.uint8]
    ) -> npt.NDArray[np.int64] | None:
        """Fills out (B, H, W, C); labels (B,). Reads shard by shard and forwards, which disks and caches like."""
        s = self.settings
        if self._reader is None:
            self._reader = ShardReader(open_store(s.url, s.access), s.manifest, s.shards)
        labels = np.zeros(len(shard), dtype=np.int64)
        for place in np.lexsort((number, shard)).tolist():
            _, label = self._reader.read_into(int(shard[place]), int(number[place]), out[place], turbo=s.turbo)
            labels[place] = label or 0
        return labels if s.manifest.classes else None

    def close(self) -> None:
        """Closes files."""
        if self._reader is not None:
            self._reader.store.close()


def _host_batch(
    pixels: torch.Tensor,
    positions: npt.NDArray[np.int64],
    label: npt.NDArray[np.int64] | None,
    augmentation: Augmentation | None,
) -> HostBatch:
    drawn = None if augmentation is None else augmentation.draw(positions)
    labels = None if label is None else torch.from_numpy(label)
    return HostBatch(pixels.permute(0, 3, 1, 2), torch.from_numpy(positions), labels, drawn)
