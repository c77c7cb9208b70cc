"""Shards in object stores on loopback (moto's server, an emulator of Google's), through s3fs and gcsfs.

What is one store's own is in test_s3_store.py and test_gs_store.py.
"""

from __future__ import annotations

import pytest
from buckets import access, serving_bucket

from sivae_dist.data.faults import DataError, StorageError
from sivae_dist.data.loader import ShardsConfig
from sivae_dist.data.shard_read import ShardReader, load_manifest
from sivae_dist.data.store import open_store
from sivae_dist.data.stores import objects

pytestmark = pytest.mark.slow


@pytest.fixture(params=["s3", "gs"])
def bucket(request, packed, monkeypatch):
    with serving_bucket(request.param, packed) as found:
        for name, value in found.env.items():
            monkeypatch.setenv(name, value)
        yield found


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("cache_gb", [0, 0.01])
def test_the_same_batches_as_from_the_folder(bucket, packed, tmp_path, workers, cache_gb):
    def served(url):
        settings = {"lanes": 8, "window": 4, "workers": workers, "cache_dir": str(tmp_path / "cache")}
        source = ShardsConfig(url=url, cache_gb=cache_gb, **settings).build(seed=5, salt=0, rank=0, ranks=1)
        batches = source.batches(0, 6)
        found = [next(batches) for _ in range(12)]
        source.close()
        return [(b.position.tolist(), b.label.tolist(), b.data.numpy().tobytes()) for b in found]

    assert served(bucket.url) == served(str(packed))


def test_damage_and_what_is_missing(bucket, tmp_path, packed):
    store = open_store(bucket.url, access(tmp_path, cache_gb=0))
    manifest = load_manifest(store)
    assert store.size("shard-000000.tar") == manifest.shards[0].bytes
    reader = ShardReader(store, manifest, manifest.shards)
    bucket.delete("sets/packed/shard-000001.index")
    with pytest.raises(DataError, match=r"shard-000001\.index is missing"):
        reader.encoded(1, 0)
    tar = (packed / "shard-000002.tar").read_bytes()
    reader.index(2)
    bucket.put("sets/packed/shard-000002.tar", tar[:700])
    with pytest.raises(DataError, match="truncated"):
        reader.encoded(2, 0)
    with pytest.raises(DataError, match=r"has no byte|truncated"):
        reader.encoded(2, manifest.shards[2].count - 1)
    bucket.put("sets/packed/shard-000002.tar", bytes(len(tar)))
    reader = ShardReader(store, manifest, manifest.shards)  # the old one knows that this shard is bad
    with pytest.raises(DataError, match="checksum differs"):
        reader.encoded(2, 0)
    scheme = bucket.url.partition(":")[0]
    with pytest.raises(DataError, match=r"manifest\.json is missing"):
        load_manifest(open_store(f"{scheme}://data/elsewhere", access(tmp_path)))


def test_a_manifest_that_is_too_long_is_not_downloaded(bucket, packed, tmp_path, monkeypatch):
    size = (packed / "manifest.json").stat().st_size
    body, held = objects._Body, []
    monkeypatch.setattr(objects, "_Body", lambda data: held.append(len(data)) or body(data))
    for more, says in ((-9, f"has more than {size - 9} bytes"), (0, ""), (1, ""), (32 << 20, "")):
        monkeypatch.setattr("sivae_dist.data.stores.base.MAX_MANIFEST_BYTES", size + more)
        store = open_store(bucket.url, access(tmp_path))
        if says:
            with pytest.raises(DataError, match=says):
                load_manifest(store)
            assert held == [size - 8]
        else:
            assert load_manifest(store).to_bytes() == (packed / "manifest.json").read_bytes()


def test_a_server_that_is_not_there(bucket, tmp_path, monkeypatch):
    for name, value in bucket.env.items():
        if value.startswith("http://"):
            monkeypatch.setenv(name, "http://127.0.0.1:9")
    with pytest.raises(StorageError, match=r"given up after .* 2 attempts") as error:
        load_manifest(open_store(bucket.url, access(tmp_path, connect_timeout_s=1)))
    assert "geheim" not in str(error.value)
