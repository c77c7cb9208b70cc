"""Shards in an S3-compatible store (moto's server on loopback), through s3fs as users have it."""

from __future__ import annotations

import pytest
from buckets import S3Bucket, fill, s3_server

from sivae_dist.data.faults import DataError, StorageError
from sivae_dist.data.loader import ShardsConfig
from sivae_dist.data.shard_read import ShardReader, load_manifest
from sivae_dist.data.store import Access, open_store

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def endpoint():
    with s3_server() as address:
        yield address


@pytest.fixture
def bucket(endpoint, packed, monkeypatch):
    found = S3Bucket(endpoint)
    for name, value in found.env.items():
        monkeypatch.setenv(name, value)
    fill(found, packed)
    yield found
    found.wipe()


def access(tmp_path, **changes) -> Access:
    return Access(**{"cache_dir": str(tmp_path / "cache"), "cache_gb": 0.01, "limit_s": 30, "retries": 1, **changes})


@pytest.mark.parametrize("workers", [0, 2])
def test_the_same_batches_as_from_the_folder(bucket, packed, tmp_path, workers):
    def served(url):
        settings = {"lanes": 8, "window": 4, "workers": workers, "cache_dir": str(tmp_path / "cache"), "cache_gb": 0.01}
        source = ShardsConfig(url=url, **settings).build(seed=5, salt=0, rank=0, ranks=1)
        batches = source.batches(0, 6)
        found = [next(batches) for _ in range(12)]
        source.close()
        return [(b.position.tolist(), b.label.tolist(), b.data.numpy().tobytes()) for b in found]

    assert served("s3://data/sets/packed") == served(str(packed))


def test_faults(bucket, tmp_path, packed, monkeypatch):
    store = open_store("s3://data/sets/packed", access(tmp_path, cache_gb=0))
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
    with pytest.raises(DataError, match=r"manifest\.json is missing"):
        load_manifest(open_store("s3://data/elsewhere", access(tmp_path)))
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(StorageError, match="given up after") as error:
        load_manifest(open_store("s3://data/sets/packed", access(tmp_path, retries=1, connect_timeout_s=1)))
    assert "geheim" not in str(error.value)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(StorageError, match="is refused"):
        load_manifest(open_store("s3://data/sets/packed", access(tmp_path)))


def test_a_library_that_is_missing_is_named(monkeypatch):
    import sys

    from sivae_dist.errors import UserError

    for scheme, library in (("s3", "s3fs"), ("gs", "gcsfs")):
        monkeypatch.setitem(sys.modules, library, None)
        with pytest.raises(UserError, match=f"needs {library}, which is not installed") as error:
            open_store(f"{scheme}://bucket/data")
        assert "pip install" in error.value.fix
