"""Shard folders as a training stream: any position in constant time, decoded by worker processes, in plan order."""

from __future__ import annotations

import functools
import logging
import os
import sys
import typing
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch

from sivae_dist.data import device_decode, jpeg
from sivae_dist.data.augment import Augmentation, Fill
from sivae_dist.data.base import DataConfig, HostBatch
from sivae_dist.data.device_decode import DeviceDecoding
from sivae_dist.data.faults import Fault
from sivae_dist.data.jpeg import DecoderName
from sivae_dist.data.parts import Parts, Reads, in_shard_order, listed, planned
from sivae_dist.data.pictures import Arrivals, Decoded, Failure, Made, Pictures, Settings, Unopened
from sivae_dist.data.plan import Plan
from sivae_dist.data.pyramid import level_for
from sivae_dist.data.replace import OnError, Tolerance
from sivae_dist.data.shard_read import load_manifest
from sivae_dist.data.slots import Slots
from sivae_dist.data.store import Access, open_store
from sivae_dist.data.stores.cache import BLOCK
from sivae_dist.data.stores.room import check_cache, remarks, uses_cache
from sivae_dist.data.watch import Watch
from sivae_dist.data.workers import InThread, LateError, LostError, Team, Work
from sivae_dist.devices import cuda_used
from sivae_dist.errors import UserError
from sivae_dist.files import size_of

log = logging.getLogger("sivae_dist")


@dataclass(frozen=True)
class ShardsConfig(DataConfig):
    """A packed data set (`sivae-dist data pack`)."""

    name: str = "shards"
    url: str = ""
    """The folder that `sivae-dist data pack` made, a path or an address (http, https, s3, gs); its manifest; or a brace
    pattern of folders or shards. Of a folder with several resolutions the model's is taken. Secrets stand in it
    as ${SIVAE_DATA_NAME}, an environment variable whose name begins so."""
    split: str = "train"
    """What is trained on."""
    held_out_split: str = "val"
    """What is evaluated on; data without this split are evaluated on what they are trained on."""
    lanes: int = 128
    """Parallel reading lanes, at least one a rank. Data, seed, lanes and window fix the order (docs/data.md)."""
    window: int = 256
    """Samples of a lane that are shuffled with each other."""
    workers: int = 2
    """Decoding processes per rank; 0 decodes in the training process."""
    prefetch: int = 4
    """Batches that each of them keeps ready."""
    decoder: DecoderName = "auto"
    """What decodes JPEGs: pillow, or simplejpeg, which is faster and an extra package (jpeg). Their pixels are the same
    bit for bit, which is checked at the start; auto takes simplejpeg where it is installed and passes the check."""
    decode: Literal["cpu", "gpu"] = "cpu"
    """Where JPEGs for training are decoded. gpu: by nvJPEG on the device that trains (extra nvjpeg); other pixels than
    the CPU's by a few of 255. Held-out pictures are always decoded on the CPU."""
    reduce: int = 1
    """Decode pictures 2, 4 or 8 times smaller a side than they are packed. JPEGs are reduced while they are decoded,
    which takes less time; not the Lanczos of a pyramid, see docs/data.md."""
    mirror: bool = True
    """Flip half of the pictures left-right. This and what follows is drawn anew each time a picture is served; held-out
    pictures stay as they are."""
    shift_px: int = 0
    """Move pictures by up to this many whole pixels, vertically and horizontally."""
    shift_fill: Fill = "white"
    """What enters at the borders then: white, black, edge (the outermost pixel) or reflect."""
    hue: float = 0.0
    """Turn hues by up to this share of the colour circle either way; 0.5 gives any hue. Grey and white stay."""
    timeout_s: int = 300
    """A batch that takes longer than this is an error instead of a hang. Less than distributed.timeout_s, within which
    the other ranks wait for it: so all can save before they end."""
    on_error: OnError = "raise"
    """What a damaged or missing picture does: raise ends the run; skip gives its slot another picture, always the same
    one; quarantine does so too and keeps a record, and its bytes, in the run folder. Servers that fail always raise."""
    max_skipped: float = 0.01
    """How many slots may get another picture before the run ends: below 1 a share of the images served (or of an epoch,
    if that is more), else a number."""
    cache_dir: str = ""
    """Where blocks of remote shards are kept, shared by all processes of a machine; empty: the user's cache folder."""
    cache_gb: float = 16.0
    """Size of that cache; 0 reads every picture from the server."""
    retries: int = 6
    """Attempts in a row that may fail before remote data are given up."""
    connect_timeout_s: float = 10.0
    """How long a server may take to accept a connection."""
    read_timeout_s: float = 60.0
    """How long a server may be silent."""

    def losses_allowed(self, nimg: int, epoch_size: int) -> float:
        """max_skipped as a number of slots."""
        return self.max_skipped if self.max_skipped >= 1 else self.max_skipped * max(nimg, epoch_size)

    def access(self) -> Access:
        """How remote files are read: within three quarters of timeout_s, so that the error can name the file."""
        return Access(
            connect_timeout_s=self.connect_timeout_s,
            read_timeout_s=self.read_timeout_s,
            retries=self.retries,
            limit_s=0.75 * self.timeout_s,
            cache_dir=self.cache_dir,
            cache_gb=self.cache_gb,
        )

    def check(self) -> None:
        """Raises UserError for a cache that others may write to."""
        check_cache(self.url, self.access())

    def at(self, sample_shape: tuple[int, ...]) -> ShardsConfig:
        """Of a folder with several resolutions that of the model. Raises UserError when it is not among them."""
        side = sample_shape[-1] * self.reduce
        wants = "the model takes" if self.reduce == 1 else f"with data.reduce {self.reduce} the model takes"
        return replace(self, url=level_for(self.url, side, self.access(), wants))

    def build(self, *, seed: int, salt: int, rank: int, ranks: int) -> ShardStream:
        """Reads the manifest only. Raises UserError for a folder or settings that cannot be used."""
        return ShardStream(self, seed=seed, salt=salt, rank=rank, ranks=ranks)


def _start_worker(number: int, pictures: Pictures) -> Work:
    """In a worker: from a packed `Reads` to what is made of it."""
    torch.set_num_threads(1)
    pictures.worker = number

    def work(message: bytes) -> bytes | Made | Unopened | Failure:
        made = pictures.make(Reads.unpacked(message))
        return made.pack() if isinstance(made, Made) else made

    return work


class _Batches(Iterator[HostBatch]):
    """Puts together what was drawn for batches and their pictures, and speaks plainly when these do not come.

    `close` ends the workers.
    """

    def __init__(
        self,
        pictures: Pictures,
        parts: Parts,
        config: ShardsConfig,
        workers: int,
        opens: DeviceDecoding | None = None,
    ) -> None:
        self._pictures, self._parts, self._config, self._opens = pictures, parts, config, opens
        pinned = cuda_used()
        arrived = Arrivals(pictures.settings, pictures.slots, pinned=pinned)
        self._found: Iterator[Decoded | Unopened | Failure] | None
        if not workers:
            self._found = (arrived(pictures.make(Reads.unpacked(reads))) for reads in parts)
            self._end = weakref.finalize(self, pictures.close)
            return
        start = functools.partial(_start_worker, pictures=pictures)
        team = Team(start, workers, parts, ahead=config.prefetch, timeout_s=config.timeout_s)
        if pinned:
            device = torch.cuda.current_device()  # of this thread; a new one would take the first
            ready: InThread[Decoded | Unopened | Failure] = InThread(
                team, arrived, enter=lambda: torch.cuda.set_device(device)
            )
            self._found, self._end = ready, weakref.finalize(self, ready.close)
        else:
            self._found, self._end = map(arrived, team), weakref.finalize(self, team.close)

    def __next__(self) -> HostBatch:
        if self._found is None:
            raise StopIteration
        try:
            found = next(self._found)
        except (LateError, LostError) as error:
            self.close()
            raise self._plain(error) from None
        part = self._parts.waiting.popleft()
        if isinstance(found, Unopened):
            assert self._opens is not None
            found = self._opens(found, Reads.unpacked(part.reads))
        if isinstance(found, Failure):
            self.close()
            raise UserError(found.what, found.fix)
        batch = HostBatch(found.pixels, part.position, found.label, part.augment, found.report)
        return _without_faults(batch) if self._pictures.settings.held_out and found.report else batch

    def close(self) -> None:
        self._found = None
        self._end()
        if self._opens is not None:
            self._opens.close()

    def _plain(self, error: LateError | LostError) -> UserError:
        if isinstance(error, LateError):
            what = f"no batch of {self._config.url} came within data.timeout_s = {self._config.timeout_s} s"
            names = [shard.name for shard in self._pictures.settings.shards]
            if self._pictures.watch is not None and (reading := self._pictures.watch.longest()):
                what += f": {reading.text(names)}"
            return UserError(what, "check the disk or network it lies on, or raise data.timeout_s")
        return UserError(
            f"a data worker process was killed ({error})", "if memory ran out, lower data.workers or data.prefetch"
        )


class ShardStream:
    """The `data.base.Stream` of a shard folder. fingerprint: that of the manifest, as `data info` prints it."""

    def __init__(self, config: ShardsConfig, *, seed: int, salt: int, rank: int, ranks: int) -> None:
        _check(config, rank, ranks)
        config.check()
        self.config, self.rank, self.ranks = config, rank, ranks
        store = open_store(config.url, config.access())
        self.manifest = load_manifest(store)
        store.close()
        m = self.manifest
        shards = m.of(config.split)
        if not shards:
            have = ", ".join(m.splits()) or "none"
            raise UserError(f"data.split is {config.split!r}, {config.url} has {have}", "choose one it has")
        self.plan = Plan([s.count for s in shards], lanes=config.lanes, window=config.window, seed=seed, salt=salt)
        if config.reduce not in jpeg.REDUCTIONS or m.resolution % config.reduce:
            possible = [str(n) for n in jpeg.REDUCTIONS if m.resolution % n == 0]
            what = f"data.reduce is {config.reduce} for pictures of {m.resolution} pixels"
            raise UserError(what, f"use {', '.join(possible)}")
        side = m.resolution // config.reduce
        self.sample_shape: tuple[int, ...] = (m.channels, side, side)
        self.epoch_size, self.classes, self.fingerprint = self.plan.epoch_size, m.classes, m.fingerprint
        augmentation = Augmentation(seed, config.mirror, config.shift_px, config.shift_fill, config.hue)
        augmentation.check(m.channels, side)
        self.decoder = jpeg.choose(config.decoder, m.image_format)
        self._decode = (
            device_decode.choose(m.image_format, m.channels, config.reduce) if config.decode == "gpu" else None
        )
        turbo, tolerance = self.decoder == "simplejpeg", Tolerance(config.on_error, seed, salt)
        self._augmentation, access, reduce = augmentation, config.access(), config.reduce
        at_once = self.plan.shards_at_once(ranks)
        self._train = Settings(config.url, access, m, shards, False, turbo, tolerance, reduce, at_once=at_once)
        self.held_out_split = config.held_out_split if m.of(config.held_out_split) else config.split
        held_out = m.of(self.held_out_split)
        self._held_out = Settings(config.url, access, m, held_out, True, turbo, tolerance, reduce)
        self._tell_of_cache(sum(s.bytes for s in shards), sum(s.bytes for s in {*shards, *held_out}))
        self._running: weakref.WeakSet[_Batches] = weakref.WeakSet()

    def batches(self, start: int, size: int | Callable[[int], int]) -> Iterator[HostBatch]:
        """Endless: this rank's samples of the global batches [start, start+size), [start+size, start+2 size), ...

        size: of all batches, or a function of the position where a batch starts.
        """
        if start < 0 or (isinstance(size, int) and size < 1):
            raise ValueError(f"batches from position {start} of size {size}")
        runs = planned(self.plan, start, size, self.rank, self.ranks)
        parts = Parts(runs, self.plan.locate, self._augmentation, pinned=cuda_used())
        watch = Watch(self.config.workers)
        settings = replace(self._train, unopened=self._decode is not None)
        pictures = Pictures(settings, self._slots(start, size if isinstance(size, int) else size(start)), watch)
        opens = None if self._decode is None else DeviceDecoding(self._decode, Pictures(self._train))
        return self._start(_Batches(pictures, parts, self.config, self.config.workers, opens))

    def _slots(self, start: int, size: int) -> Slots:
        """Memory for this rank's part of batches of `size` and a little more, as parts differ in size."""
        workers = self.config.workers
        parts = [len(self.plan.owned(start + i * size, size, self.rank, self.ranks)) for i in range(8)]
        count = max(parts) + (self.ranks > 1)
        # All that a worker may prepare, the batch in hand and the one before it.
        each = self.config.prefetch + 2 if workers else 2
        one = self._train.sample_bytes()
        if self._decode is not None:  # tars, with some room as pictures differ; what does not fit goes the plain way
            one = 2 * sum(s.bytes for s in self._train.shards) // self.epoch_size
        return Slots(max(1, workers), each, count * one, shared=workers > 0)

    def _tell_of_cache(self, trained: int, both: int) -> None:
        """Warns, once a machine, of what makes reading slow: no cache that can be written, too little room for it, or
        one so small that blocks are driven out before they are used up, and fetched again and again.
        """
        local = _ranks_here()
        if self.rank % local:
            return
        told = [str(remark) for remark in remarks(self.config.url, self.config.access(), both)]
        lanes = self.config.lanes * min(1.0, local / self.ranks)
        needed = min(float(trained), lanes * (self.plan.window * trained / self.epoch_size + BLOCK))
        if uses_cache(self.config.url, self.config.access()) and needed > self.config.cache_gb * 1e9:
            what = f"data.cache_gb is {self.config.cache_gb:g}, but the lanes of this machine read {size_of(needed)}"
            told.append(f"{what} at a time: blocks will be fetched again and again. Raise it, or lower data.window")
        for text in told:
            _tell(text)

    def held_out(self, limit: int, batch: int = 32) -> list[HostBatch]:
        """Every ranks-th of the first `limit` samples of `held_out_split`; position is the number in shard order."""
        total = sum(s.count for s in self._held_out.shards)
        numbers = list(range(self.rank, min(limit, total), self.ranks))
        if not numbers:
            return []
        runs = listed(numbers, batch)
        parts = Parts(runs, in_shard_order(self._held_out.shards), None)
        workers = min(self.config.workers, len(runs)) if len(runs) > 1 else 0
        running = self._start(_Batches(Pictures(self._held_out, None, Watch(workers)), parts, self.config, workers))
        try:
            found = list(running)
        finally:
            running.close()
        self._tell_of_lost([fault for batch in found if batch.report for fault in batch.report.faults], len(numbers))
        return [batch for batch in found if len(batch.position)]

    def _tell_of_lost(self, faults: list[Fault], asked: int) -> None:
        """Held-out pictures that are left out: told every time. Raises UserError when they are too many."""
        if not faults:
            return
        what = f"{len(faults)} of {asked} held-out pictures cannot be used, the first: {faults[0].what}"
        if len(faults) > self.config.losses_allowed(0, asked):
            raise UserError(what, "copy the shards again, or raise data.max_skipped")
        _tell(f"{what}; they are left out")

    def close(self) -> None:
        """Ends worker processes and closes files."""
        for running in list(self._running):
            running.close()

    def _start(self, batches: _Batches) -> _Batches:
        self._running.add(batches)
        return batches


def _without_faults(batch: HostBatch) -> HostBatch:
    """Held-out pictures have no replacements: one of them would count twice in what is measured."""
    assert batch.report is not None
    good = ~torch.isin(batch.position, torch.tensor([fault.position for fault in batch.report.faults]))
    label = None if batch.label is None else batch.label[good]
    return HostBatch(batch.data[good], batch.position[good], label, None, batch.report)


def _tell(text: str) -> None:
    """On the terminal and in the rank's log, where that is open: else logging would print it a second time."""
    if log.hasHandlers():
        log.warning(text)
    print(text, file=sys.stderr, flush=True)


def _ranks_here() -> int:
    """Ranks of this machine, by the launcher's environment; they share a cache."""
    text = os.environ.get("LOCAL_WORLD_SIZE", "1")
    return max(1, int(text)) if text.isdecimal() else 1


def _check(config: ShardsConfig, rank: int, ranks: int) -> None:
    if not 0 <= rank < ranks:
        raise ValueError(f"rank {rank} of {ranks}")
    if ranks > config.lanes:
        what = f"data.lanes is {config.lanes}, fewer than the {ranks} ranks: some would get no data"
        raise UserError(what, f"start the run with data.lanes of {ranks} or a multiple")
    if config.decode not in ("cpu", "gpu"):
        raise UserError(f"data.decode is {config.decode!r:.40}, expected cpu or gpu", "correct data.decode")
    if config.on_error not in typing.get_args(OnError):
        expected = ", ".join(typing.get_args(OnError))
        raise UserError(
            f"data.on_error is {config.on_error!r:.40}, expected one of {expected}", "correct data.on_error"
        )
    limits: list[tuple[str, float, float]] = [
        ("workers", 0, 512),
        ("prefetch", 1, 4096),
        ("timeout_s", 1, 10**7),
        ("retries", 0, 10**6),
    ]
    limits += [
        ("connect_timeout_s", 0.01, 10**6),
        ("read_timeout_s", 0.01, 10**6),
        ("cache_gb", 0, 10**7),
        ("max_skipped", 0, 10**12),
    ]
    for name, low, high in limits:
        if not low <= (value := getattr(config, name)) <= high:
            raise UserError(f"data.{name} is {value}, expected {low} to {high}", f"correct data.{name}")
