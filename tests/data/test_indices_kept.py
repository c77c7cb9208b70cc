"""How many indices a reader holds: enough that none is parsed again while a lane is in its shard, and no more."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from sivae_dist.apps.bench.plan import MadeUpStore, Size
from sivae_dist.data import shard_read
from sivae_dist.data.loader import ShardsConfig
from sivae_dist.data.manifest import Manifest
from sivae_dist.data.pictures import Pictures
from sivae_dist.data.plan import Plan
from sivae_dist.data.shard_read import ShardReader, load_index
from sivae_dist.data.store import FolderStore

LANES, SHARDS, SAMPLES = 1024, 4096, 6 * 4096


@pytest.fixture(scope="module")
def store() -> MadeUpStore:
    """4,096 shards of 6 samples; only their indices can be read."""
    return MadeUpStore(Size(samples=SAMPLES, shards=SHARDS, sample_bytes=100))


@pytest.fixture
def loads(monkeypatch) -> Counter:
    """How often each index was read and parsed."""
    found: Counter = Counter()

    def load(store, shard, classes):
        found[shard.name] += 1
        return load_index(store, shard, classes)

    monkeypatch.setattr(shard_read, "load_index", load)
    return found


@pytest.mark.parametrize("ranks", [1, 2])
def test_no_index_is_parsed_twice_while_a_lane_is_in_its_shard(store, loads, ranks):
    manifest = Manifest.from_bytes(store.manifest, store.url)
    plan = Plan([s.count for s in manifest.shards], lanes=LANES, window=2, seed=3)
    kept = plan.shards_at_once(ranks)
    reader, few = (ShardReader(store, manifest, manifest.shards, at_once) for at_once in (kept, 0))
    assert (reader.kept, few.kept) == (kept, 256)
    assert kept == 2 * LANES // ranks < SHARDS
    served = [plan.owned(start, 512, 0, ranks) for start in range(0, SAMPLES, 512)]
    places = [plan.locate(positions)[0].tolist() for positions in served]
    lane_in_shard = set(zip(np.concatenate(served) % LANES, np.concatenate(places), strict=True))
    for shards in places:
        for shard in shards:
            reader.index(shard)
        assert len(reader._indices) <= kept
    assert loads.total() <= len(lane_in_shard)
    loads.clear()
    for shards in places[: len(places) // 4]:
        for shard in shards:
            few.index(shard)
    assert loads.total() > len(lane_in_shard), "what so many lanes need matters"


def test_fewer_lanes_a_rank_and_fewer_shards_are_fewer_indices():
    plan = Plan([1000] * 3000, lanes=1024, window=256)
    assert [plan.shards_at_once(ranks) for ranks in (1, 8, 1024)] == [2048, 256, 2]
    assert Plan([1000] * 30 + [0] * 9, lanes=1024, window=256).shards_at_once(1) == 30


def test_a_stream_tells_its_readers(packed, monkeypatch):
    monkeypatch.setattr(shard_read, "_INDICES_KEPT", 1)
    source = ShardsConfig(url=str(packed), workers=0, lanes=8).build(seed=0, salt=0, rank=0, ranks=1)
    pictures = Pictures(source._train)
    assert pictures._opened().kept == source.plan.shards_at_once(1) == len(source.manifest.of("train")) > 1
    pictures.close()
    source.close()


def test_keys_come_back_as_they_were(packed):
    manifest = shard_read.load_manifest(FolderStore(packed))
    for shard in manifest.shards:
        index = load_index(FolderStore(packed), shard, manifest.classes)
        written = [
            line.split(b'"')[1].decode() for line in (packed / f"{shard.name}.index").read_bytes().splitlines()[1:]
        ]
        assert index.keys == written == [index.key(number) for number in range(shard.count)]
