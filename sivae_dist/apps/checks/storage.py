"""Disk, shared memory, limits, and the data set."""

from __future__ import annotations

import contextlib
import math
import resource
import shutil
import tempfile
from pathlib import Path

from sivae_dist.apps.checks.base import Check, ok, problem, warning

GB = 1e9
_SHARDS_OPENED = 16


def out_folder(out: Path) -> list[Check]:
    """Whether runs can be written there, and how much fits."""
    folder = out
    while not folder.exists():
        folder = folder.parent
    name = "out folder"
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"x")
            file.flush()
    except OSError as error:
        what = f"{out} cannot be written ({folder}: {error.strerror})"
        return [problem(name, what, "choose another folder with --out, mend the permissions, or make room")]
    free = shutil.disk_usage(folder).free
    what = f"{out}: {free / GB:.1f} GB free"
    if free < 0.1 * GB:
        return [problem(name, what, "make room: a checkpoint does not fit")]
    if free < 10 * GB:
        return [warning(name, what, "make room for checkpoints (`--dry-run` tells their size), or lower keep_last")]
    return [ok(name, what)]


def shared_memory() -> list[Check]:
    """/dev/shm carries what NCCL sends between GPUs of a machine that do not reach each other. Data need none of it."""
    path = Path("/dev/shm")
    remedy = "start the container with --shm-size=8g (or --ipc=host)"
    if not path.is_dir():
        return [warning("/dev/shm", "is missing: NCCL may need it between the GPUs of a machine", remedy)]
    usage = shutil.disk_usage(path)
    what = f"{usage.total / GB:.2f} GB, {usage.free / GB:.2f} GB free"
    return [warning("/dev/shm", what, remedy) if usage.free < 1 * GB else ok("/dev/shm", what)]


def open_files() -> list[Check]:
    """Shards, sockets and shared-memory blocks are open files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    remedy = f"ulimit -n {hard if hard != resource.RLIM_INFINITY else 65536} before the run (hard limit: {hard})"
    if soft < 256:
        return [problem("open files", f"at most {soft}: data workers run out of them", remedy)]
    if soft < 1024:
        return [warning("open files", f"at most {soft}: shards are closed and opened again all the time", remedy)]
    return [ok("open files", f"at most {soft}")]


def memory() -> list[Check]:
    """Host memory, and a container's limit of it."""
    total, free, limit = (part / GB for part in _memory())
    what = f"{total:.1f} GB, {free:.1f} GB available"
    if limit < math.inf:
        what += f", container limit {limit:.1f} GB"
        free = min(free, limit)
    return [ok("memory", what) if free >= 2 else warning("memory", what, "end other programs, or lower data.workers")]


def available_memory() -> float:
    """Bytes of host memory that a run may take."""
    _, free, limit = _memory()
    return min(free, limit)


def _memory() -> tuple[float, float, float]:
    """Bytes in all, available, and a container's limit (infinite without one)."""
    fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines() if ":" in line)
    total, free = (float(fields[key].split()[0]) * 1024 for key in ("MemTotal", "MemAvailable"))
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.is_file() else "max"
    return total, free, float(text) if text.isdecimal() else math.inf


def data_cache(url: str, folder: str, size_gb: float) -> list[Check]:
    """Whether blocks of data elsewhere can be kept in that folder. Data of this machine need none."""
    from sivae_dist.data.pyramid import addresses_of  # noqa: PLC0415
    from sivae_dist.data.shard_read import load_manifest  # noqa: PLC0415
    from sivae_dist.data.store import Access, open_store  # noqa: PLC0415
    from sivae_dist.data.stores import room  # noqa: PLC0415
    from sivae_dist.errors import UserError  # noqa: PLC0415

    name, access = "data cache", Access(cache_dir=folder, cache_gb=size_gb)
    if not room.uses_cache(url, access):
        return []
    room.check_cache(url, access)
    size = math.inf
    with contextlib.suppress(UserError):  # what is wrong with the data is told by the look at them
        once = Access(cache_gb=0, retries=0)
        manifests = [load_manifest(open_store(level, once)) for level in addresses_of(url, once) or (url,)]
        size = max(sum(shard.bytes for shard in manifest.shards) for manifest in manifests)
    if found := room.remarks(url, access, size):
        return [warning(name, remark.what, remark.remedy) for remark in found]
    return [ok(name, room.described(access))]


def data(url: str) -> list[Check]:
    """The manifest, the size of every shard, and the first and last sample of some shards, decoded.

    A folder with several resolutions is looked at resolution by resolution.
    """
    from sivae_dist.data.pyramid import addresses_of  # noqa: PLC0415
    from sivae_dist.data.shard_read import ShardReader, load_manifest  # noqa: PLC0415
    from sivae_dist.data.store import Access, open_store  # noqa: PLC0415
    from sivae_dist.errors import UserError  # noqa: PLC0415

    if levels := addresses_of(url):
        return [check for level in levels for check in data(level)]
    store = open_store(url, Access(cache_gb=0))
    manifest = load_manifest(store)
    bad: list[UserError] = []
    for shard in manifest.shards:
        try:
            if (size := store.size(f"{shard.name}.tar")) != shard.bytes:
                what = f"{shard.name}.tar has {size} bytes, the manifest says {shard.bytes}"
                bad.append(UserError(what, "copy the shard again, or pack the data set again"))
        except UserError as error:
            bad.append(error)
    reader = ShardReader(store, manifest, manifest.shards)
    filled = [n for n, s in enumerate(manifest.shards) if s.count]
    step = max(1, -(-len(filled) // _SHARDS_OPENED))
    chosen = sorted({*filled[::step], *filled[-1:]})
    for number in chosen if not bad else []:
        try:
            for place in sorted({0, manifest.shards[number].count - 1}):
                reader.read(number, place)
        except UserError as error:
            bad.append(error)
    store.close()
    total = sum(s.count for s in manifest.shards)
    if bad:
        more = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
        return [problem("data", f"{bad[0].what}{more}", f"{bad[0].fix}; `sivae-dist data verify` reads everything")]
    what = f"{url}: {total} samples of {manifest.resolution} px in {len(manifest.shards)} shards"
    return [ok("data", f"{what}; first and last sample of {len(chosen)} shards decoded")]
