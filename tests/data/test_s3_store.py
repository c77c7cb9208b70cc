"""What is S3's own among object stores (moto's server on loopback, through s3fs), and libraries that are missing."""

from __future__ import annotations

import pytest
from buckets import S3Bucket, access, serving_bucket

from sivae_dist.data.faults import StorageError
from sivae_dist.data.shard_read import load_manifest
from sivae_dist.data.store import open_store

pytestmark = pytest.mark.slow


def test_without_credentials(packed, tmp_path, monkeypatch):
    with serving_bucket("s3", packed) as bucket:
        for name, value in bucket.env.items():
            if name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
                monkeypatch.delenv(name, raising=False)
            else:
                monkeypatch.setenv(name, value)
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        monkeypatch.setenv("HOME", str(tmp_path))
        with pytest.raises(StorageError, match="is refused"):
            load_manifest(open_store(S3Bucket.url, access(tmp_path)))


def test_a_library_that_is_missing_is_named(monkeypatch):
    import sys

    from sivae_dist.errors import UserError

    for scheme, library in (("s3", "s3fs"), ("gs", "gcsfs")):
        monkeypatch.setitem(sys.modules, library, None)
        with pytest.raises(UserError, match=f"needs {library}, which is not installed") as error:
            open_store(f"{scheme}://bucket/data")
        assert "pip install" in error.value.fix
