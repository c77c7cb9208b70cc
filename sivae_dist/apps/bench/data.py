"""Speed of loading pictures: the loader beside bare decoding of the same bytes, which is the limit, and beside others.

All deliver batches of uint8 pictures to the training process, in random order, from files that the page cache holds;
the pixels are not looked at there. They take turns: each turn starts worker processes, lets them warm up, and then
counts images, wall time and the CPU time of all processes together. CPU time an image is what to compare on a machine
that others use too.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import multiprocessing
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from sivae_dist.data import device_decode, jpeg
from sivae_dist.data.decode import decode_into
from sivae_dist.data.loader import ShardsConfig
from sivae_dist.data.manifest import Manifest
from sivae_dist.data.pack import pack
from sivae_dist.data.pack_shard import PackOptions
from sivae_dist.data.shard_read import ShardReader, load_manifest
from sivae_dist.data.sources.base import Item
from sivae_dist.data.sources.scenes import ScenesSource
from sivae_dist.data.store import open_store
from sivae_dist.errors import UserError

_SHARDS = 8
_KEPT = 4  # batches of each worker that are held at first: as many as the loader's workers keep ready
_IN_MEMORY = 128 << 20  # bytes of encoded pictures that bare decoding goes round and round
BARE = "bare decode"
_GPU = "sivae-dist, nvjpeg"


@dataclass(frozen=True)
class Row:
    """Medians over turns.

    cpu_ms:       CPU time an image, of all processes
    of_bare:      bare decoding's CPU time by this: images per core and second, as a share of the limit
    wall_of_bare: images a second, as a share of those that as many processes decode barely
    """

    name: str
    resolution: int
    workers: int
    images_per_s: float
    cpu_ms: float
    of_bare: float
    wall_of_bare: float


@dataclass(frozen=True)
class Pictures:
    """The same pictures in all three shapes: shards, single files, bytes in memory."""

    url: str
    manifest: Manifest
    folder: Path
    encoded: list[bytes] = field(repr=False)

    @property
    def kilobytes(self) -> float:
        """Mean size of an encoded picture."""
        return statistics.fmean(map(len, self.encoded)) / 1000


@dataclass
class Grainy(ScenesSource):
    """Scenes with normal noise on every pixel, as films and sensors make it: smooth scenes compress like no photo."""

    grain: float = 0.0

    def open(self, item: Item, resolution: int) -> Image.Image:
        """The scene painted at `resolution`, RGB."""
        picture = np.asarray(super().open(item, resolution))
        if not self.grain:
            return Image.fromarray(picture)
        noise = np.random.default_rng(int(item.key[-6:])).standard_normal(picture.shape, dtype=np.float32)
        return Image.fromarray(np.clip(np.rint(picture + self.grain * noise), 0, 255).astype(np.uint8))


def draw(root: Path, resolution: int, count: int, grain: float) -> str:
    """Packs `count` scenes into a shard folder below root; its path."""
    options = PackOptions(resolution, shard_size=str(-(-count // _SHARDS)))
    pack(Grainy(count, grain=grain), root / str(resolution), options, workers=1, progress=False)
    return str(root / str(resolution))


def laid_out(url: str, folder: Path) -> Pictures:
    """Reads a shard folder's training pictures, as many as fit into memory, and writes each into a file in `folder`."""
    store = open_store(url)
    manifest = load_manifest(store)
    shards = manifest.of("train")
    reader = ShardReader(store, manifest, shards)
    encoded: list[bytes] = []
    folder.mkdir(parents=True)
    places = ((s, i) for s, shard in enumerate(shards) for i in range(shard.count))
    for number, (shard, index) in enumerate(places):
        if sum(map(len, encoded)) > _IN_MEMORY:
            break
        encoded.append(reader.encoded(shard, index)[1])
        (folder / f"{number:06d}.{manifest.image_format}").write_bytes(encoded[-1])
    store.close()
    return Pictures(url, manifest, folder, encoded)


class Contender:
    """One way to get batches. `batches` is an endless iterator of anything with one image per entry of its length."""

    def __init__(
        self, name: str, batches: Callable[[], Iterator[Any]], close: Callable[[], None], *, first: int = 0
    ) -> None:
        self.name, self.batches, self.close = name, batches, close
        self.first = first  # count these images from the very first on, instead of a turn's seconds after a start


def ours(pictures: Pictures, workers: int, batch: int, decoder: jpeg.DecoderName, **settings: Any) -> Contender:
    """The loader with the defaults of its configuration, and what is given."""
    options: dict[str, Any] = {"url": pictures.url, "workers": workers, "decoder": decoder} | settings
    config = ShardsConfig(**options)
    stream = config.build(seed=0, salt=0, rank=0, ranks=1)
    return Contender(f"sivae-dist, {stream.decoder}", lambda: stream.batches(0, batch), stream.close)


def stock_webdataset(pictures: Pictures, workers: int, batch: int) -> Contender:
    """webdataset as its documentation has it: shards and a buffer shuffled, decoded to torch, batched in workers."""
    shards = pictures.manifest.of("train")
    if len(shards) < workers:
        raise UserError(
            f"{pictures.url} has {len(shards)} shards, webdataset needs one a worker", "use fewer --workers"
        )
    urls = [str(Path(pictures.url.removeprefix("file://")) / f"{s.name}.tar") for s in shards]
    images = webdataset.WebDataset(urls, shardshuffle=len(urls), seed=0).shuffle(256, rng=None)
    images = images.decode("torchrgb8").to_tuple(pictures.manifest.image_format).batched(batch).repeat()
    loader = webdataset.WebLoader(images, batch_size=None, num_workers=workers)
    return Contender("webdataset", lambda: (x for (x,) in loader), lambda: None)


class _Files(Dataset[torch.Tensor]):
    """A folder of pictures as one writes it by hand, and as torchvision's ImageFolder does it."""

    def __init__(self, folder: Path) -> None:
        self.files = sorted(folder.iterdir())

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, number: int) -> torch.Tensor:
        with Image.open(self.files[number]) as image:
            return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).contiguous()


def folder(pictures: Pictures, workers: int, batch: int) -> Contender:
    """A file a picture, and torch's DataLoader."""
    # Workers that live on; by default they are started anew every epoch, which short ones would mostly consist of.
    loader = DataLoader(
        _Files(pictures.folder),
        batch,
        shuffle=True,
        num_workers=workers,
        drop_last=True,
        persistent_workers=workers > 0,
    )
    return Contender("folder of files", lambda: itertools.chain.from_iterable(itertools.repeat(loader)), lambda: None)


def _served(
    pictures: Pictures, address: str, workers: int, batch: int, decoder: jpeg.DecoderName, caches: list[str], way: str
) -> Contender:
    """The loader over HTTP. way: cold (the first epoch, into an empty cache), warm (the last cold one's), none."""
    if way == "cold":
        caches.append(tempfile.mkdtemp(dir=pictures.folder.parent, prefix="cache-"))
    settings = {"cache_gb": 0.0} if way == "none" else {"cache_dir": caches[-1]}
    found = ours(pictures, workers, batch, decoder, url=address, **settings)
    if way == "cold":
        found.first = sum(s.count for s in pictures.manifest.of("train"))
    return found


def run(
    pictures: Pictures,
    workers: int,
    *,
    batch: int,
    seconds: float,
    turns: int,
    only: tuple[str, ...] = (),
    address: str = "",
) -> list[Row]:
    """Measures all at one number of workers, each for `turns` turns of `seconds`. address: serves the same shards."""
    if len(pictures.encoded) < 2 * batch:
        what = f"{pictures.url} has {len(pictures.encoded)} pictures for batches of {batch}"
        raise UserError(what, "give data with more pictures, or a smaller --batch")
    fast = jpeg.choose("auto", pictures.manifest.image_format)
    makers: dict[str, Callable[[], Contender]] = {
        f"sivae-dist, {fast}": lambda: ours(pictures, workers, batch, fast),
        "sivae-dist, pillow": lambda: ours(pictures, workers, batch, "pillow"),
        _GPU: lambda: ours(pictures, workers, batch, "auto", decode="gpu"),
        "webdataset": lambda: stock_webdataset(pictures, workers, batch),
        "folder of files": lambda: folder(pictures, workers, batch),
    }
    caches: list[str] = []
    for way, name in {"cold": "http, empty cache", "warm": "http, full cache", "none": "http, no cache"}.items():
        if address:
            makers[name] = functools.partial(_served, pictures, address, workers, batch, fast, caches, way)
    if pictures.manifest.image_format != "jpg" or device_decode.unusable():
        del makers[_GPU]
    found: dict[str, list[tuple[float, float]]] = {f"{BARE}, {fast}": [], f"{BARE}, pillow": []}
    found |= {name: [] for name in makers if not only or name in only}
    for _ in range(turns):
        for name, times in found.items():
            if name.startswith(BARE):
                times.append(
                    _bare(pictures, batch, max(1, workers), name.removeprefix(f"{BARE}, ") != "pillow", seconds)
                )
            else:
                times.append(_turn(makers[name](), batch, workers, seconds))
    rate = {name: statistics.median(r for r, _ in times) for name, times in found.items()}
    cpu = {name: statistics.median(c for _, c in times) for name, times in found.items()}
    limit = f"{BARE}, {fast}"
    # Shares are medians of the turns' shares: what slows the machine for a while slows neighbours alike.
    rows = []
    for name, times in found.items():
        pairs = list(zip(found[limit], times, strict=True))
        of_bare = statistics.median(bare_cpu / own_cpu for (_, bare_cpu), (_, own_cpu) in pairs)
        wall = statistics.median(own_rate / bare_rate for (bare_rate, _), (own_rate, _) in pairs)
        resolution = pictures.manifest.resolution
        rows.append(Row(name, resolution, workers, rate[name], cpu[name] * 1e3, of_bare, wall))
    return rows


def _turn(contender: Contender, batch: int, workers: int, seconds: float) -> tuple[float, float]:
    """Images a second, CPU seconds an image."""
    with _quiet():
        started = _cpu()
        batches = contender.batches()
        if not contender.first:
            # Kept at the same time, so that memory that is used again and again has been used once: the kernel takes
            # longer to give a batch of memory than all that is measured here, but only when a run begins.
            kept = [next(batches) for _ in range(_KEPT * max(1, workers))]
            del kept
            # Every worker makes a batch more, and as many again: what was prepared meanwhile does not count.
            for _ in range(2 * max(1, workers) + 2):
                next(batches)
        images, cpu, begin = 0, started if contender.first else _cpu(), time.perf_counter()
        least, until = (contender.first, begin) if contender.first else (2 * batch, begin + seconds)
        while images < least or time.perf_counter() < until:
            images += len(_pixels(next(batches)))
        wall, cpu = time.perf_counter() - begin, _cpu() - cpu
        del batches
        contender.close()
    return images / wall, cpu / images


def _pixels(batch: Any) -> torch.Tensor:
    pixels: torch.Tensor = getattr(batch, "data", batch) if not isinstance(batch, torch.Tensor) else batch
    return pixels


def _cpu() -> float:
    """CPU seconds of this process and of its children, those that live and those that have ended."""
    living = 0.0
    for process in multiprocessing.active_children():  # this also collects those that have ended
        with contextlib.suppress(OSError):
            # A process' clock by its number, as clock_getcpuclockid(3) makes it.
            living += time.clock_gettime(~(process.pid or 0) << 3 | 2)
    ended = os.times()
    return time.process_time() + ended.children_user + ended.children_system + living


def _bare(pictures: Pictures, batch: int, processes: int, turbo: bool, seconds: float) -> tuple[float, float]:
    """As `_turn`, of decoding alone: each process decodes bytes in its memory into the memory of one batch."""
    if processes == 1:
        images, wall, cpu = _decode_for(pictures, batch, turbo, seconds)
        return images / wall, cpu / images
    context = multiprocessing.get_context("fork")
    ends = [context.Pipe(duplex=False) for _ in range(processes)]
    running = [context.Process(target=_send, args=(end, pictures, batch, turbo, seconds)) for _, end in ends]
    for process in running:
        process.start()
    done = [receive.recv() for receive, _ in ends]
    for process in running:
        process.join()
    images = sum(n for n, _, _ in done)
    return sum(n / wall for n, wall, _ in done), sum(cpu for _, _, cpu in done) / images


def _send(end: Any, pictures: Pictures, batch: int, turbo: bool, seconds: float) -> None:
    end.send(_decode_for(pictures, batch, turbo, seconds))
    end.close()
    os._exit(0)


def _decode_for(pictures: Pictures, batch: int, turbo: bool, seconds: float) -> tuple[int, float, float]:
    """Images, wall seconds, CPU seconds."""
    m = pictures.manifest
    memory = np.zeros((batch, m.resolution, m.resolution, m.channels), dtype=np.uint8)
    images, warm = 0, batch
    cpu, begin = time.process_time(), time.perf_counter()
    for number, data in enumerate(itertools.cycle(pictures.encoded)):
        if number == warm:
            images, cpu, begin = 0, time.process_time(), time.perf_counter()
        out = memory[number % batch]
        if not (turbo and jpeg.decode_into(data, out)):
            decode_into(data, out, image_format=m.image_format)
        images += 1
        if number > warm and time.perf_counter() > begin + seconds:
            break
    return images, time.perf_counter() - begin, time.process_time() - cpu


@contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's advice about more workers than cores."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="This DataLoader will create", category=UserWarning)
        yield
