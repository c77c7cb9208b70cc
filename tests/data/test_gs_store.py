"""What is Google's own among object stores: refusals, credentials (on loopback, through gcsfs)."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from buckets import GoogleBucket, access, serving_bucket

from sivae_dist.data.faults import DataError, StorageError
from sivae_dist.data.shard_read import load_manifest
from sivae_dist.data.store import open_store

pytestmark = pytest.mark.slow

URL = GoogleBucket.url


def test_a_bucket_that_is_not_there(packed, tmp_path, monkeypatch):
    with serving_bucket("gs", packed) as bucket:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", bucket.env["STORAGE_EMULATOR_HOST"])
        with pytest.raises(DataError, match=r"manifest\.json is missing"):
            load_manifest(open_store("gs://nobody/sets/packed", access(tmp_path)))


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
