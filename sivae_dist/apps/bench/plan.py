"""The data plan at the size of a cluster, by simulation: no pictures, no processes, the arithmetic that a run would do.

Costs: starting, resuming, memory of a rank and of its workers. Promises: every sample once an epoch, equal shares of
every batch, ranks that come and go within an epoch. Quality: how well served order is shuffled, compared with a full
shuffle, and what reads it takes.
"""

from __future__ import annotations

import hashlib
import json
import time
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from sivae_dist.data.manifest import Manifest, ShardInfo
from sivae_dist.data.plan import Int64, Plan
from sivae_dist.data.shard_read import ShardReader
from sivae_dist.data.shard_write import BLOCK, INDEX_FORMAT, INDEX_VERSION
from sivae_dist.data.stores.base import NoMemory

_CHUNK = 1 << 20  # positions located at once
# Lanes and windows that are compared.
CHOICES = (
    (32, 256),
    (128, 64),
    (128, 256),
    (128, 1024),
    (128, 4096),
    (512, 256),
    (1024, 256),
    (1024, 1024),
    (1024, 4096),
)
Result = TypeVar("Result")


@dataclass(frozen=True)
class Size:
    """What is simulated. sample_bytes: of an encoded picture."""

    samples: int = 3_000_000
    shards: int = 3_000
    ranks: int = 1024
    lanes: int = 1024
    window: int = 256
    batch: int = 8192
    sample_bytes: int = 200_000

    def counts(self) -> Int64:
        """Samples of each shard, as the packer makes them: equal, or one more."""
        base, more = divmod(self.samples, self.shards)
        return np.full(self.shards, base, dtype=np.int64) + (np.arange(self.shards) < more)

    def plan(self, *, lanes: int = 0, window: int = 0) -> Plan:
        """The plan of these shards; lanes and window may differ."""
        return Plan(self.counts(), lanes=lanes or self.lanes, window=window or self.window, seed=1)


class MadeUpStore(NoMemory):
    """A shard folder of this size as far as its manifest and indices go. Pictures cannot be read."""

    url = "simulated"

    def __init__(self, size: Size) -> None:
        super().__init__()
        counts = size.counts().tolist()
        self._index: dict[str, bytes] = {}
        self._bytes: dict[str, int] = {}
        step = (-(-size.sample_bytes // BLOCK) + 3) * BLOCK  # header, picture, header and facts
        made = {count: self._rows(count, size.sample_bytes, step) for count in set(counts)}
        shards = []
        for number, count in enumerate(counts):
            name, data, total = f"shard-{number:06d}", made[count], count * step + 2 * BLOCK
            self._index[f"{name}.index"], self._bytes[f"{name}.tar"] = data, total
            digest = hashlib.sha256(data).hexdigest()
            shards.append(ShardInfo(name, "train", count, total, digest, digest))
        self.manifest = Manifest("simulated", "none", 256, 3, "jpg", 0, (), tuple(shards)).to_bytes()

    @staticmethod
    def _rows(count: int, sample_bytes: int, step: int) -> bytes:
        head = {"format": INDEX_FORMAT, "version": INDEX_VERSION, "count": count, "bytes": count * step + 2 * BLOCK}
        rows = [
            [f"folder-{i % 100:03d}/picture-{i:08d}", BLOCK + i * step, sample_bytes, i, None] for i in range(count)
        ]
        return b"\n".join(json.dumps(row, separators=(",", ":")).encode() for row in [head, *rows]) + b"\n"

    def size(self, name: str) -> int:
        """Bytes of a tar or an index."""
        return len(self._index[name]) if name in self._index else self._bytes[name]

    def read(self, name: str, offset: int, length: int) -> bytes:
        """Of an index."""
        return self._index[name][offset : offset + length]

    def whole(self, name: str, limit: int) -> bytes:
        """An index."""
        return self._index[name][: limit + 1]

    def close(self) -> None:
        """Nothing is open."""


def costs(size: Size, *, epochs: float = 2.0) -> dict[str, float]:
    """Seconds of CPU to start and to resume, and the memory that rank 0 holds: its parts, in MB (1e6 bytes).

    start_s:   manifest parsed and checked, plan made, the rank's first batch located, indices for it parsed and checked
    resume_s:  the same in the middle of the hundredth epoch, with the manifest at hand; both the worst of five
    rank_mb:   of the training process, which locates samples: manifest, plan, its tables and windows
    worker_mb: of a data worker, which reads them: manifest, indices
    peak_mb:   the most that all of these took, with what came and went
    """
    store = MadeUpStore(size)
    last = 100 * size.samples

    def begin(position: int, manifest: Manifest | None) -> tuple[Manifest, Plan, ShardReader]:
        manifest = manifest or Manifest.from_bytes(store.manifest, store.url)
        shards = manifest.of("train")
        counts = [s.count for s in shards]
        plan = Plan(counts, lanes=size.lanes, window=size.window, seed=1)
        reader = ShardReader(store, manifest, shards, plan.shards_at_once(size.ranks))
        for shard in np.unique(plan.locate(plan.owned(position, size.batch, 0, size.ranks))[0]).tolist():
            reader.index(shard)
        return manifest, plan, reader

    (manifest, plan, reader), start_s = _slowest(lambda: begin(0, None))
    _, resume_s = _slowest(lambda: begin(last + size.samples // 2 + 12345, manifest))

    found = {"start_s": start_s, "resume_s": resume_s}
    tracemalloc.start()
    try:
        manifest, found["manifest_mb"] = _held(lambda: Manifest.from_bytes(store.manifest, store.url))
        plan, found["plan_mb"] = _held(lambda: Plan(size.counts(), lanes=size.lanes, window=size.window, seed=1))
        shards = manifest.of("train")
        reader, _ = _held(lambda: ShardReader(store, manifest, shards, plan.shards_at_once(size.ranks)))
        parts = _batches(plan, size, int(epochs * size.samples))
        _, found["plan_tables_and_windows_mb"] = _held(lambda: [len(plan.locate(p)[0]) for p in parts()])
        touched = np.unique(np.concatenate([plan.locate(p)[0] for p in parts()])).tolist()
        _, found["indices_mb"] = _held(lambda: [len(reader.index(s).packed) for s in touched[: reader.kept + 1]])
        found["rank_mb"] = found["manifest_mb"] + found["plan_mb"] + found["plan_tables_and_windows_mb"]
        found["worker_mb"] = found["manifest_mb"] + found["indices_mb"]
        found["peak_mb"] = tracemalloc.get_traced_memory()[1] / 1e6
    finally:
        tracemalloc.stop()
    return found


def _batches(plan: Plan, size: Size, until: int) -> Callable[[], Iterator[Int64]]:
    """Rank 0's part of batches spread evenly over positions up to `until`, at most 500 of them."""
    starts = np.linspace(0, until, 500).astype(np.int64) // size.batch * size.batch
    return lambda: (plan.owned(int(start), size.batch, 0, size.ranks) for start in np.unique(starts))


def _slowest(action: Callable[[], Result]) -> tuple[Result, float]:
    times = []
    for _ in range(5):
        begin = time.process_time()
        result = action()
        times.append(time.process_time() - begin)
    return result, max(times)


def _held(action: Callable[[], Result]) -> tuple[Result, float]:
    """The result, and the megabytes that it leaves allocated (results of `locate` are dropped by the caller)."""
    before = tracemalloc.get_traced_memory()[0]
    result = action()
    return result, (tracemalloc.get_traced_memory()[0] - before) / 1e6


def served(plan: Plan, epoch: int = 0) -> Int64:
    """(N,) for each position of an epoch the sample's number in the order in which it was packed."""
    first = np.concatenate([[0], np.cumsum(plan.counts)[:-1]])
    number = np.empty(plan.epoch_size, dtype=np.int64)
    for start in range(0, plan.epoch_size, _CHUNK):
        positions = np.arange(start, min(start + _CHUNK, plan.epoch_size)) + epoch * plan.epoch_size
        shard, index = plan.locate(positions)
        number[start : start + len(positions)] = first[shard] + index
    return number


def promises(size: Size, *, changes: tuple[int, ...] = (8, 6, 16)) -> dict[str, float]:
    """What must be zero, or at most one.

    lost_or_doubled:     samples of epoch 1 not served exactly once
    uneven:              largest difference between ranks' parts of a global batch, within an epoch
    uneven_straddling:   the same of batches that straddle two epochs
    changes_lost:        samples lost or doubled in an epoch that first changes[0] ranks serve, then changes[1], ...
    """
    plan = size.plan()
    times_served = np.bincount(served(plan, 1), minlength=size.samples)
    within, straddling = _unevenness(plan, size)
    rescaled = size.plan(lanes=max(size.lanes if size.lanes < 1024 else 128, *changes))
    numbers, count = served(rescaled), np.zeros(size.samples, dtype=np.int64)
    ends = np.linspace(0, size.samples, len(changes) + 1).astype(np.int64)
    for ranks, start, end in zip(changes, ends[:-1].tolist(), ends[1:].tolist(), strict=True):
        for rank in range(ranks):
            count[numbers[rescaled.owned(start, end - start, rank, ranks)]] += 1
    return {
        "lost_or_doubled": int((times_served != 1).sum()),
        "uneven": within,
        "uneven_straddling": straddling,
        "changes_lost": int((count != 1).sum()),
    }


def _unevenness(plan: Plan, size: Size) -> tuple[int, int]:
    """Over the batches of two epochs: max - min of the ranks' numbers of samples, without and with an epoch's end."""
    within = straddling = 0
    for start in range(0, 2 * size.samples, size.batch):
        parts = np.bincount(plan.owners(start, size.batch, size.ranks), minlength=size.ranks)
        gap = int(parts.max() - parts.min())
        if start // size.samples == (start + size.batch - 1) // size.samples:
            within = max(within, gap)
        else:
            straddling = max(straddling, gap)
    return within, straddling


def mixing(size: Size, lanes: int, window: int) -> dict[str, float]:
    """How well an epoch is shuffled (1 is a full shuffle, except for correlation, 0), and what reading it takes.

    correlation: Spearman's, of the order packed and the order served
    neighbours:  mean distance in packed order of samples served one after another
    spread:      mean distance in served order of samples packed side by side
    shard_span:  standard deviation of the positions of a shard's samples
    same_shard:  pairs of a batch that come from one shard
    run:         samples of a batch that one rank can read without a seek, mean, when it reads a batch in order
    shards_open: shards that one window's worth of all lanes touches
    window_mb:   bytes of one window of all lanes: what a cache must hold to read everything in runs of a window
    """
    plan = size.plan(lanes=lanes, window=window)
    packed = served(plan)
    n = len(packed)
    third, spread = (n - 1 / n) / 3, n / np.sqrt(12)
    position = np.empty(n, dtype=np.int64)
    position[packed] = np.arange(n)
    shard = np.repeat(np.arange(size.shards), size.counts())
    by_shard = np.split(position.astype(np.float64), np.cumsum(size.counts())[:-1])
    centred = np.arange(n) - (n - 1) / 2
    usable = n // size.batch * size.batch
    batches = packed[:usable].reshape(-1, size.batch)
    in_order = np.sort(batches, axis=1)
    same = shard[in_order]
    pairs = sum(float((c * (c - 1)).sum()) / 2 for c in (np.unique(row, return_counts=True)[1] for row in same))
    chance = float((size.counts() * (size.counts() - 1)).sum()) / (n * (n - 1))
    runs = ((np.diff(in_order, axis=1) != 1) | (np.diff(same, axis=1) != 0)).sum() + len(batches)
    reach = min(n, lanes * plan.window)
    return {
        "lanes": lanes,
        "window": window,
        "correlation": float((centred * (packed - (n - 1) / 2)).sum() / (centred**2).sum()),
        "neighbours": float(np.abs(np.diff(packed)).mean() / third),
        "spread": float(np.abs(np.diff(position)).mean() / third),
        "shard_span": float(np.mean([p.std() for p in by_shard]) / spread),
        "same_shard": pairs / (len(batches) * size.batch * (size.batch - 1) / 2 * chance),
        "run": usable / float(runs),
        "shards_open": float(len(np.unique(shard[packed[:reach]]))),
        "window_mb": lanes * plan.window * size.sample_bytes / 1e6,
    }
