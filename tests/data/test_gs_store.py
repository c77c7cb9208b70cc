"""Shards in Google's kind of store (an emulator on loopback), through gcsfs as users have it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from buckets import GoogleBucket, fill, google_server

from sivae_dist.data.faults import DataError, StorageError
from sivae_dist.data.loader import ShardsConfig
from sivae_dist.data.shard_read import ShardReader, load_manifest
from sivae_dist.data.store import Access, open_store

pytestmark = pytest.mark.slow

URL = GoogleBucket.url


@pytest.fixture(scope="module")
def endpoint():
    with google_server() as address:
        yield address


@pytest.fixture
def bucket(endpoint, packed, monkeypatch):
    found = GoogleBucket(endpoint)
    for name, value in found.env.items():
        monkeypatch.setenv(name, value)
    fill(found, packed)
    yield found
    found.wipe()


def access(tmp_path, **changes) -> Access:
    return Access(**{"cache_dir": str(tmp_path / "cache"), "cache_gb": 0.01, "limit_s": 30, "retries": 1, **changes})


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

    assert served(URL) == served(str(packed))


def test_faults(bucket, tmp_path, packed, monkeypatch):
    store = open_store(URL, access(tmp_path, cache_gb=0))
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
    bucket.put("sets/packed/shard-000002.tar", bytes(len(tar)))
    reader = ShardReader(store, manifest, manifest.shards)
    with pytest.raises(DataError, match="checksum differs"):
        reader.encoded(2, 0)
    for nowhere in ("gs://data/elsewhere", "gs://nobody/sets/packed"):
        with pytest.raises(DataError, match=r"manifest\.json is missing"):
            load_manifest(open_store(nowhere, access(tmp_path)))
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://127.0.0.1:9")
    with pytest.raises(StorageError, match=r"given up after .* 2 attempts"):
        load_manifest(open_store(URL, access(tmp_path)))


@pytest.mark.parametrize(
    ("status", "text", "requests"),
    [
        (401, "is refused: Anonymous caller", 1),
        (403, "is refused: Forbidden", 1),
        (503, r"HttpError 503.*given up after .* 2 attempts", 2),
        (400, "cannot be read: Bad Request", 1),
        (0, r"TimeoutError.*given up after .* 2 attempts", 2),
    ],
)
def test_refusals_end_at_once_and_the_rest_is_tried_again(tmp_path, monkeypatch, status, text, requests):
    asked, release = [], threading.Event()

    class Refuses(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            if not status:
                release.wait(10)
                return
            words = "invalid argument" if status == 400 else "Anonymous caller does not have storage.objects.get access"
            body = json.dumps({"error": {"code": status, "message": words}}).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Refuses)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{server.server_address[1]}")
    try:
        with pytest.raises(StorageError, match=text):
            load_manifest(open_store(URL, access(tmp_path, read_timeout_s=0.5)))
    finally:
        release.set()
        server.shutdown()
        server.server_close()
    assert len(asked) == requests


READ = """
from sivae_dist.data.shard_read import load_manifest
from sivae_dist.data.store import Access, open_store
from sivae_dist.errors import UserError
try:
    load_manifest(open_store("gs://data/sets/packed", Access(cache_gb=0, limit_s=4)))
except UserError as error:
    print(type(error).__name__, error.what, error.fix, sep="|")
"""


def reading(tmp_path, **env) -> str:
    """What a process is told that reads a bucket where no credentials are about."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("GOOGLE_", "STORAGE_", "FSSPEC_", "GCE_"))}
    home = {"HOME": str(tmp_path), "CLOUDSDK_CONFIG": str(tmp_path / "gcloud")}
    command = [sys.executable, "-c", READ]
    done = subprocess.run(command, env=clean | home | env, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.startswith("StorageError|"), done
    assert "Traceback" not in done.stderr
    return done.stdout


def test_without_credentials_the_remedy_is_told(tmp_path):
    told = reading(tmp_path, NO_GCE_CHECK="true")
    assert "gs://data/sets/packed: no credentials: Your default credentials were not found" in told
    assert "GOOGLE_APPLICATION_CREDENTIALS" in told
    assert "FSSPEC_GS_TOKEN=anon" in told
    (tmp_path / "key.json").write_text('{"type": "service_account"}')
    told = reading(tmp_path, NO_GCE_CHECK="true", GOOGLE_APPLICATION_CREDENTIALS=str(tmp_path / "key.json"))
    assert "no credentials: " in told
    assert str(tmp_path / "key.json") in told


def test_a_metadata_server_that_never_answers_is_given_up(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts by its queue, and says nothing
        place = "127.0.0.1:{1}".format(*silent.getsockname())
        told = reading(tmp_path, GCE_METADATA_HOST=place, GCE_METADATA_IP=place, GCE_METADATA_TIMEOUT="60")
    assert "no credentials were found within 4 s" in told
    assert "NO_GCE_CHECK=true" in told
