"""The block cache: shared by processes, bounded, whole after kills, and no harm when its disk is full."""

from __future__ import annotations

import errno
import gc
import multiprocessing
import os
import resource
import signal
import time

import pytest
from web import serving

from sivae_dist.data.loader import ShardsConfig
from sivae_dist.data.shard_read import ShardReader, load_manifest
from sivae_dist.data.store import Access, FolderStore, open_store
from sivae_dist.data.stores import cache as cache_module
from sivae_dist.data.stores.base import Events
from sivae_dist.data.stores.cache import BlockCache
from sivae_dist.errors import UserError

KIB = 1 << 10


def made(folder, limit=1 << 20) -> BlockCache:
    return BlockCache(folder, limit, Events())


def size(folder) -> int:
    return sum(p.stat().st_size for p in (folder / "blocks").rglob("*") if p.is_file())


def test_what_is_put_is_read(tmp_path):
    cache = made(tmp_path)
    assert cache.read("ab-0") is None
    assert cache.put("ab-0", b"0123456789")
    assert cache.read("ab-0") == b"0123456789"
    assert made(tmp_path).read("ab-0", 2, 3) == b"234"
    assert cache.read("ab-0", 5, 30) is None, "more than there is"
    cache.put("ab-1", b"x")
    cache.drop("ab-1")
    assert cache.read("ab-1") is None
    cache.close()


@pytest.mark.parametrize("use", ["read", "put", "lock", "run"])
@pytest.mark.parametrize("whose", ["everybody's", "everybody's, sticky", "somebody else's"])
def test_folders_that_others_may_write_to_are_refused(packed, tmp_path, monkeypatch, use, whose):
    folder = tmp_path / "cache"
    folder.mkdir()
    if whose == "somebody else's":
        monkeypatch.setattr("os.geteuid", lambda: os.getuid() + 1)
    else:
        folder.chmod(0o1777 if "sticky" in whose else 0o777)
    text = "belongs to another user" if "else" in whose else "everybody may write to the data cache"
    with pytest.raises(UserError, match=text) as told:
        if use == "read":
            made(folder).read("ab-0")
        elif use == "put":
            made(folder).put("ab-0", b"x")
        elif use == "lock":
            with made(folder).lock("ab-0", 0):
                pytest.fail("it was taken")
        else:
            with serving(packed) as web:
                config = ShardsConfig(url=web.url, cache_dir=str(folder), cache_gb=0.01, workers=1)
                next(config.build(seed=0, salt=0, rank=0, ranks=1).batches(0, 4))
    assert "set data.cache_dir" in told.value.fix
    assert not list(folder.iterdir())


def test_a_new_folder_is_ones_own(tmp_path):
    tmp_path.chmod(0o777)
    cache = made(tmp_path / "mine")
    assert cache.read("ab-0") is None
    assert cache.put("ab-0", b"x")
    assert cache.read("ab-0") == b"x"
    assert (tmp_path / "mine").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize(
    "damage", [lambda d: d[:-1], lambda d: d[:30] + b"?" + d[31:], lambda d: b"", lambda d: d + b"x"]
)
def test_damaged_blocks_are_not_used(tmp_path, damage):
    made(tmp_path).put("ab-0", bytes(100))
    (path,) = (tmp_path / "blocks").rglob("ab-0")
    path.write_bytes(damage(path.read_bytes()))
    cache = made(tmp_path)
    assert cache.read("ab-0") is None
    assert cache.events.counts["cache_damaged"] == 1
    assert not path.exists()


@pytest.fixture
def checks(monkeypatch):
    """Whole blocks that were read to check them."""
    found, check = [], cache_module._checked_length
    monkeypatch.setattr(cache_module, "_checked_length", lambda handle: found.append(handle) or check(handle))
    return found


def filled(folder, blocks) -> BlockCache:
    """Blocks of four bytes, written a while ago: the clock of a file system may stand still between two writes."""
    writer = made(folder)
    for number in range(blocks):
        writer.put(f"ab-{number}", b"%04d" % number)
        os.utime(writer._path(f"ab-{number}"), (1000, 1000))
    return made(folder)


def open_files(folder) -> int:
    inside = str(folder / "blocks")
    links = (f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd"))
    return sum(os.path.exists(link) and os.readlink(link).startswith(inside) for link in links)


def test_a_block_is_checked_once_though_fewer_may_be_open(tmp_path, monkeypatch, checks):
    monkeypatch.setattr(cache_module, "_OPEN_MOST", 8)
    cache, blocks = filled(tmp_path, 40), range(40)
    for _ in range(3):
        for number in blocks:
            assert cache.read(f"ab-{number}") == b"%04d" % number
            assert open_files(tmp_path) <= 8
    assert len(checks) == 40
    other = made(tmp_path)  # as another process: it checks for itself, and writes down that it uses a block
    assert [other.read(f"ab-{number}") for number in blocks] == [cache.read(f"ab-{number}") for number in blocks]
    assert len(checks) == 80
    assert cache._path("ab-0").stat().st_atime > 1e9


def test_a_block_that_was_replaced_or_changed_is_checked_again(tmp_path, monkeypatch, checks):
    monkeypatch.setattr(cache_module, "_IDLE_S", -1.0)  # closed before the next one is opened
    cache = filled(tmp_path, 3)
    for number in (0, 1, 2, 0, 1, 2):
        assert cache.read(f"ab-{number}") == b"%04d" % number
    assert len(checks) == 3
    made(tmp_path).put("ab-0", b"new!")
    assert cache.read("ab-0") == b"new!"
    assert len(checks) == 4
    with open(cache._path("ab-1"), "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"?")
    assert cache.read("ab-1") is None
    assert len(checks) == 5
    assert cache.events.counts["cache_damaged"] == 1
    made(tmp_path).put("ab-1", b"0001")
    cache.drop("ab-2")
    made(tmp_path).put("ab-2", b"0002")
    assert cache.read("ab-1") == b"0001" and cache.read("ab-2") == b"0002"
    assert len(checks) == 7


def test_what_is_remembered_and_open_is_bounded(tmp_path, monkeypatch, checks):
    monkeypatch.setattr(cache_module, "_CHECKED_MOST", 4)
    cache = filled(tmp_path, 12)
    for number in range(12):
        cache.read(f"ab-{number}")
    assert len(cache._checked) == 4
    cache.close()
    monkeypatch.setattr(resource, "getrlimit", lambda _: (160, 4096))
    others = [made(tmp_path / str(number)) for number in range(4)]  # of the other folders of a pattern
    gc.collect()
    share = max(4, 160 // 4 // len(cache_module._CACHES))
    assert len(others) == 4 <= share < 12
    for number in range(12):
        cache.read(f"ab-{number}")
        assert open_files(tmp_path) == min(number + 1, share)


def test_a_process_that_may_open_no_more_files_closes_blocks(tmp_path, monkeypatch):
    cache, opening, refused = filled(tmp_path, 6), os.open, []

    def full(path, *flags, **options):
        if open_files(tmp_path) >= 3 and str(path).startswith(str(tmp_path)):
            refused.append(path)
            raise OSError(errno.EMFILE, "Too many open files")
        return opening(path, *flags, **options)

    monkeypatch.setattr(os, "open", full)
    assert [cache.read(f"ab-{number}") for number in range(6)] == [b"%04d" % number for number in range(6)]
    assert len(refused) == 3


def test_the_least_recently_used_go_first(tmp_path):
    cache = made(tmp_path, limit=640 * KIB)
    assert cache.block == 64 * KIB
    for number in range(6):
        cache.put(f"ab-{number}", bytes(cache.block))
        os.utime(next((tmp_path / "blocks").rglob(f"ab-{number}")), (1000 + number,) * 2)
    made(tmp_path, limit=640 * KIB).read("ab-0")  # used again
    for number in range(6, 40):
        cache.put(f"ab-{number}", bytes(cache.block))
        assert size(tmp_path) <= 640 * KIB
        if number == 9:
            fresh = made(tmp_path)
            assert fresh.read("ab-0") is not None
            assert fresh.read("ab-1") is None
    assert cache.events.counts["cache_evicted"] >= 30
    assert size(tmp_path) >= 320 * KIB, "it keeps what it may"


def _writer(folder, number):
    cache = made(folder, limit=640 * KIB)
    for block in range(60):
        with cache.lock(f"{number}{block}-0", time.monotonic() + 5):
            cache.put(f"{number}{block}-0", os.urandom(cache.block))


@pytest.mark.dist
def test_processes_share_it_and_may_be_killed_at_any_time(tmp_path):
    context = multiprocessing.get_context("fork")
    for round_ in range(4):
        workers = [context.Process(target=_writer, args=(tmp_path, number)) for number in range(3)]
        for worker in workers:
            worker.start()
        time.sleep(0.03 + 0.05 * round_)
        for worker in workers:
            os.kill(worker.pid, signal.SIGKILL)
            worker.join()
    cache = made(tmp_path, limit=640 * KIB)
    for path in (tmp_path / "blocks").rglob("*-0"):
        assert cache.read(path.name) is not None
    assert cache.events.counts["cache_damaged"] == 0
    begun = time.monotonic()
    with cache.lock("00-0", begun + 5):
        assert time.monotonic() - begun < 4, "the locks of killed processes are free"
    for path in (tmp_path / "blocks").rglob("*.tmp"):
        os.utime(path, (0, 0))
    for number in range(20):
        cache.put(f"zz{number}-0", bytes(cache.block))
    assert not list((tmp_path / "blocks").rglob("*.tmp")), "what killed processes left is removed"
    assert size(tmp_path) <= 640 * KIB


def test_a_held_lock_is_not_waited_for_beyond_its_time(tmp_path):
    cache, other = made(tmp_path), made(tmp_path)
    with cache.lock("ab", time.monotonic() + 1), other.lock("ab", time.monotonic() + 0.1):
        pass


def test_a_full_disk_means_no_cache(tmp_path, monkeypatch):
    cache = made(tmp_path)
    cache.put("ab-0", b"kept")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(cache, "_write", full)
    assert not cache.put("ab-1", b"x")
    assert not cache.put("ab-2", b"x")
    assert not cache.accepts()
    events = cache.events.take()
    assert events.counts["cache_refused"] == 2
    assert len(events.notes) == 1
    assert "No space left on device" in events.notes[0]
    assert cache.read("ab-0") == b"kept"


def test_a_full_disk_is_tried_with_half_the_cache(tmp_path, monkeypatch):
    cache = made(tmp_path)
    for number in range(12):
        cache.put(f"ab-{number}", bytes(cache.block))
    write, calls = cache._write, []

    def full_once(key, data):
        calls.append(key)
        if len(calls) == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(key, data)

    monkeypatch.setattr(cache, "_write", full_once)
    assert cache.put("ab-99", b"x")
    assert cache.events.counts["cache_evicted"] >= 4


@pytest.mark.parametrize("place", ["file", "under a file"])
def test_a_cache_that_cannot_be_written_is_none(packed, tmp_path, place):
    (tmp_path / "file").write_text("")
    folder = tmp_path / "file" if place == "file" else tmp_path / "file" / "x"
    with serving(packed) as web:
        store = open_store(web.url, Access(cache_dir=str(folder), cache_gb=0.01))
        manifest = load_manifest(store)
        reader, local = ShardReader(store, manifest, manifest.shards), FolderStore(packed)
        truth = ShardReader(local, manifest, manifest.shards)
        for shard, info in enumerate(manifest.shards):
            for number in range(info.count):
                assert reader.encoded(shard, number) == truth.encoded(shard, number)
    events = store.events.take()
    assert len(events.notes) == 1 and "reading without it" in events.notes[0]
    assert events.counts["cache_refused"] > 10


def test_a_disk_that_fills_up_while_blocks_are_fetched_ahead(packed, tmp_path, monkeypatch):
    """What cannot be kept any more is not asked for ahead: a range of no bytes is none."""
    monkeypatch.setattr("sivae_dist.data.stores.remote._AT_ONCE", 1)
    with serving(packed) as web:
        store = open_store(web.url, Access(cache_dir=str(tmp_path / "cache"), cache_gb=0.01))
        manifest = load_manifest(store)
        write, calls = store.cache._write, []

        def fills_up(key, data):
            calls.append(key)
            if len(calls) > len(manifest.shards) + 1:  # all indices and one block
                raise OSError(errno.ENOSPC, "No space left on device")
            write(key, data)

        monkeypatch.setattr(store.cache, "_write", fills_up)
        reader, truth = (
            ShardReader(store, manifest, manifest.shards),
            ShardReader(FolderStore(packed), manifest, manifest.shards),
        )
        everything = [(shard, number) for shard, info in enumerate(manifest.shards) for number in range(info.count)]
        reader.prepare(*zip(*everything, strict=True))
        assert len(calls) == len(manifest.shards) + 2
        assert all("--" not in asked.headers.get("range", "") for asked in web.asked)
        for shard, number in everything:
            assert reader.encoded(shard, number) == truth.encoded(shard, number)
