"""Samples that cannot be used: another one in the same slot, the same on every run; or a clear end, never a hang."""

from __future__ import annotations

import contextlib
import shutil
import time
import traceback
from pathlib import Path

import numpy as np
import pytest
from drawn import rows, spoil
from web import How, serving

from sivae_dist.data.again import BadShards
from sivae_dist.data.faults import REASONS, DataError
from sivae_dist.data.loader import ShardsConfig
from sivae_dist.data.plan import Plan
from sivae_dist.data.replace import Tolerance
from sivae_dist.data.shard_read import ShardReader, load_manifest
from sivae_dist.data.store import FolderStore
from sivae_dist.data.watch import INDEX, Watch
from sivae_dist.errors import UserError

SEED = 5


@pytest.fixture
def folder(packed, tmp_path):
    return Path(shutil.copytree(packed, tmp_path / "damaged"))


def stream(url, *, rank=0, ranks=1, salt=0, **config):
    settings = {"workers": 0, "lanes": 8, "window": 4, "on_error": "skip"} | config
    return ShardsConfig(url=str(url), **settings).build(seed=SEED, salt=salt, rank=rank, ranks=ranks)


def served(url, *, start=0, count=36, ranks=1, **config):
    """{position: (mirror, label, picture)} and the faults by position, over all ranks."""
    found, faults = {}, {}
    for rank in range(ranks):
        source = stream(url, rank=rank, ranks=ranks, **config)
        batches = source.batches(start, count // 4)
        for _ in range(4):
            batch = next(batches)
            for i, position in enumerate(batch.position.tolist()):
                found[position] = (bool(batch.augment.mirror[i]), int(batch.label[i]), batch.data[i].numpy().tobytes())
            for fault in batch.report.faults if batch.report else ():
                faults[fault.position] = fault
        source.close()
    return dict(sorted(found.items())), dict(sorted(faults.items()))


DAMAGE = {
    "crc": lambda f: spoil(f, "shard-000001", 3),
    "decode": lambda f: spoil(f, "shard-000001", 3, b"no picture"),
    "missing": lambda f: (f / "shard-000001.tar").unlink(),
    "truncated": lambda f: (f / "shard-000001.tar").write_bytes((f / "shard-000001.tar").read_bytes()[:-2000]),
    "index": lambda f: (f / "shard-000001.index").write_text("no index"),
}


@pytest.mark.parametrize("reason", REASONS)
def test_a_bad_sample_gets_the_same_replacement_on_every_run(packed, folder, reason):
    DAMAGE[reason](folder)
    whole, none = served(packed)
    assert none == {}
    found, faults = served(folder)
    numbers = [3] if reason in ("crc", "decode") else range(len(rows(packed, "shard-000001")))
    manifest = load_manifest(FolderStore(packed))
    infos = manifest.of("train")
    shard = [s.name for s in infos].index("shard-000001")
    plan = Plan([s.count for s in infos], lanes=8, window=4, seed=SEED)
    hit = {
        p
        for p in range(36)
        for s, n in [[int(v[0]) for v in plan.locate(np.array([p]))]]
        if s == shard and n in numbers
    }
    assert set(faults) == hit
    assert {f.reason for f in faults.values()} == {reason}
    assert {(f.shard, f.number) for f in faults.values()} == {("shard-000001", n) for n in numbers}
    reader = ShardReader(FolderStore(packed), manifest, infos)
    ends = np.cumsum([s.count for s in infos])
    for position in range(36):
        if position not in hit:
            assert found[position] == whole[position]
            continue
        for attempt in range(16):
            place = Tolerance("skip", SEED, 0).candidate(position, attempt, 36)
            where = int(np.searchsorted(ends, place, side="right"))
            number = place - int(ends[where]) + infos[where].count
            if where != shard or number not in numbers:
                break
        sample = reader.read(where, number)
        assert found[position] == (whole[position][0], sample.label, sample.image.tobytes())
    assert served(folder, ranks=3, workers=2 if reason == "crc" else 0) == (found, faults)
    later = served(folder, start=20, count=16)
    assert later == ({p: v for p, v in found.items() if p >= 20}, {p: f for p, f in faults.items() if p >= 20})


def test_the_salt_and_the_seed_choose_the_replacement():
    def drawn(seed, salt):
        return [Tolerance("skip", seed, salt).candidate(p, 0, 1000) for p in range(50)]

    assert drawn(1, 0) == drawn(1, 0)
    assert len({tuple(drawn(*x)) for x in ((1, 0), (2, 0), (1, 1))}) == 3
    assert len(set(drawn(1, 0))) > 40


def test_the_default_is_to_end(folder):
    spoil(folder, "shard-000001", 3)
    with pytest.raises(UserError, match="checksum differs"):
        served(folder, on_error="raise")
    with pytest.raises(UserError, match=r"data\.on_error is 'ignore', expected one of raise, skip, quarantine"):
        stream(folder, on_error="ignore")


def test_when_everything_is_bad_it_ends(folder):
    for path in folder.glob("*.tar"):
        path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(UserError, match="16 samples that could take its place are bad, too"):
        served(folder)


def test_a_server_that_fails_is_never_skipped(packed, tmp_path):
    with serving(packed) as web:
        source = stream(web.url, cache_gb=0, retries=0)
        web.how = lambda a: How(403) if a.name.endswith("tar") else How()
        with pytest.raises(UserError, match="is refused"):
            next(source.batches(0, 4))
        web.how = lambda a: How(404) if a.name == "shard-000001.tar" else How()
        _, faults = served(web.url, cache_gb=0)
        assert {f.reason for f in faults.values()} == {"missing"}
        assert len(faults) == len(rows(packed, "shard-000001"))
        assert web.names().count("shard-000001.tar") == 1, "a shard that is not there is asked for once"


@pytest.mark.parametrize("way", ["folder", "http", "pattern"])
@pytest.mark.parametrize("reason", ["missing", "truncated", "index", "gone later"])
def test_a_shard_that_comes_back_is_used_again(packed, folder, monkeypatch, reason, way):
    """After ever longer pauses, and from then on its own samples are served, as if nothing had been."""
    now = [1000.0]
    monkeypatch.setattr("sivae_dist.data.again._clock", lambda: now[0])
    whole, _ = served(packed, count=360)
    with contextlib.ExitStack() as stack:
        web = stack.enter_context(serving(folder)) if way == "http" else None
        count = len(list(folder.glob("*.tar")))
        braces = f"{folder}/shard-{{000000..{count - 1:06d}}}.tar"
        source = stream(web.url if web else braces if way == "pattern" else folder, cache_gb=0)
        batches = source.batches(0, 36)
        if reason == "gone later":
            assert next(batches).report is None or way == "http"
            source._running.copy().pop()._pictures.close()  # so that files are opened again
        DAMAGE["missing" if reason == "gone later" else reason](folder)
        asked = []
        for pause in (0, 1, 28.5, 1, 58, 2):  # 30 s after the first failure, then 60 s after the second
            now[0] += pause
            before = len(web.asked) if web else 0
            batch = next(batches)
            assert len(batch.report.faults) == len(rows(packed, "shard-000001"))
            assert not batch.report.notes
            asked.append(any(a.name.startswith("shard-000001") for a in web.asked[before:]) if web else None)
        if way == "http":
            assert asked == [True, False, False, True, False, True]
        for path in packed.glob("shard-000001.*"):
            shutil.copy(path, folder / f"{path.name}.new").replace(folder / path.name)
        now[0] += 119
        assert len(next(batches).report.faults) == len(rows(packed, "shard-000001"))
        now[0] += 2
        batch = next(batches)
        assert not batch.report.faults
        assert len(batch.report.notes) == 1
        assert batch.report.notes[0].endswith("shard-000001.tar can be read again")
        for i, position in enumerate(batch.position.tolist()):
            assert batch.data[i].numpy().tobytes() == whole[position][2]
        source.close()


def test_pauses_grow_and_end_growing(monkeypatch):
    now, bad = [0.0], BadShards()
    monkeypatch.setattr("sivae_dist.data.again._clock", lambda: now[0])
    error, pauses = DataError("missing", "gone"), []
    for _ in range(9):
        bad.failed(4, error)
        begun = now[0]
        while bad.error(4):
            now[0] += 1
        assert bad.begins(4)
        assert not bad.begins(4)
        pauses.append(now[0] - begun)
    assert pauses == [30, 60, 120, 240, 480, 960, 1800, 1800, 1800]
    assert bad.works(4)
    assert not bad.works(4)
    bad.failed(4, error)
    for _ in range(100):
        with pytest.raises(DataError):
            raise bad.error(4)
    assert len(traceback.extract_tb(error.__traceback__)) < 5


def test_quarantine_has_the_bytes(folder):
    spoil(folder, "shard-000001", 3)
    _, faults = served(folder, on_error="quarantine", workers=1)
    (fault,) = faults.values()
    row = rows(folder, "shard-000001")[3]
    assert fault.keep
    assert fault.key == row[0]
    assert fault.data == (folder / "shard-000001.tar").read_bytes()[row[1] : row[1] + row[2]]
    _, faults = served(folder, on_error="skip")
    assert not next(iter(faults.values())).data


def test_held_out_pictures_are_left_out(packed, folder, capsys):
    val = load_manifest(FolderStore(packed)).of("val")[0].name
    spoil(folder, val, 1)
    for workers in (0, 2):
        (first, *more) = stream(folder, max_skipped=1, workers=workers).held_out(5, batch=3)
        assert [p for b in (first, *more) for p in b.position.tolist()] == [0, 2, 3, 4]
        assert len(first.data) == len(first.label) == 2
    assert "1 of 5 held-out pictures cannot be used" in capsys.readouterr().err
    whole = stream(packed).held_out(5, batch=5)[0]
    np.testing.assert_array_equal(first.data[1], whole.data[2])
    with pytest.raises(UserError, match="1 of 5 held-out pictures"):
        stream(folder).held_out(5, batch=3)
    with pytest.raises(UserError, match="checksum differs"):
        stream(folder, on_error="raise").held_out(5, batch=3)


def test_how_much_may_be_lost():
    assert ShardsConfig(max_skipped=0.01).losses_allowed(500, 1000) == 10
    assert ShardsConfig(max_skipped=0.01).losses_allowed(5000, 1000) == 50
    assert ShardsConfig(max_skipped=7).losses_allowed(5000, 1000) == 7
    assert ShardsConfig(max_skipped=0).losses_allowed(5000, 1000) == 0


@pytest.mark.dist
def test_what_hangs_is_named(packed, monkeypatch):
    read = FolderStore.read

    def stuck(store, name, offset, length):
        return time.sleep(600) if name == "shard-000002.tar" else read(store, name, offset, length)

    monkeypatch.setattr(FolderStore, "read", stuck)
    source = stream(packed, workers=2, timeout_s=3)
    says = r"within data\.timeout_s = 3 s: worker \d has been reading \d+ bytes at \d+ of shard-000002\.tar for \d+ s"
    with pytest.raises(UserError, match=says):
        for batch in source.batches(0, 4):
            assert len(batch)


def test_the_watch_names_the_longest(monkeypatch):
    watch = Watch(3)
    assert watch.longest() is None
    watch.teller(2)(1, 512, 100)
    time.sleep(0.01)
    watch.teller(0)(0, INDEX, 0)
    reading = watch.longest()
    assert reading.text(["a", "b"]).startswith("worker 2 has been reading 100 bytes at 512 of b.tar for 0 s")
    watch.teller(2)(-1, 0, 0)
    assert watch.longest().text(["a", "b"]).startswith("worker 0 has been reading a.index for")
