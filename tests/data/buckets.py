"""Object stores on loopback: moto's server for S3, an emulator of Google's, each with one bucket called `data`."""

from __future__ import annotations

import contextlib
import json
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote

from sivae_dist.data.store import Access


class Bucket(Protocol):
    """env: what a client's environment must hold. url: of the folder that `fill` makes."""

    env: dict[str, str]
    url: str

    def put(self, name: str, data: bytes) -> None: ...

    def delete(self, name: str) -> None: ...

    def wipe(self) -> None: ...


def fill(bucket: Bucket, folder: Path) -> None:
    """Uploads the files of a folder to sets/packed."""
    for path in folder.iterdir():
        bucket.put(f"sets/packed/{path.name}", path.read_bytes())


def access(folder: Path, **changes: Any) -> Access:
    """How to read, with a small cache below a folder and little patience."""
    return Access(**{"cache_dir": str(folder / "cache"), "cache_gb": 0.01, "limit_s": 30, "retries": 1, **changes})


class GoogleBucket:
    """What the tests do to it, over the same requests as any client's."""

    url = "gs://data/sets/packed"

    def __init__(self, endpoint: str) -> None:
        self.endpoint, self.env = endpoint, {"STORAGE_EMULATOR_HOST": endpoint}
        self.ask("POST", "/storage/v1/b", json.dumps({"name": "data"}).encode())

    def ask(self, method: str, path: str, body: bytes | None = None) -> None:
        headers = {"Content-Type": "application/json" if path == "/storage/v1/b" else "application/octet-stream"}
        request = urllib.request.Request(self.endpoint + path, body, headers, method=method)
        with urllib.request.urlopen(request, timeout=10) as answer:
            assert answer.status < 300

    def put(self, name: str, data: bytes) -> None:
        self.ask("POST", f"/upload/storage/v1/b/data/o?uploadType=media&name={quote(name, safe='')}", data)

    def delete(self, name: str) -> None:
        self.ask("DELETE", f"/storage/v1/b/data/o/{quote(name, safe='')}")

    def wipe(self) -> None:
        self.ask("GET", "/wipe")


class S3Bucket:
    """The same of S3, with boto3."""

    url = "s3://data/sets/packed"

    def __init__(self, endpoint: str) -> None:
        import boto3

        self.env = {
            "AWS_ACCESS_KEY_ID": "AKIAEXAMPLE",
            "AWS_SECRET_ACCESS_KEY": "geheim",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": endpoint,
        }
        self.client: Any = boto3.client(
            "s3",
            endpoint_url=endpoint,
            aws_access_key_id=self.env["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=self.env["AWS_SECRET_ACCESS_KEY"],
            region_name=self.env["AWS_DEFAULT_REGION"],
        )
        self.client.create_bucket(Bucket="data")

    def put(self, name: str, data: bytes) -> None:
        self.client.put_object(Bucket="data", Key=name, Body=data)

    def delete(self, name: str) -> None:
        self.client.delete_object(Bucket="data", Key=name)

    def wipe(self) -> None:
        for entry in self.client.list_objects_v2(Bucket="data").get("Contents", []):
            self.delete(entry["Key"])


@contextlib.contextmanager
def google_server() -> Iterator[str]:
    """Its address."""
    from gcp_storage_emulator.server import create_server

    server = create_server("127.0.0.1", 0, in_memory=True)
    server.start()
    try:
        yield "http://127.0.0.1:{1}".format(*server._api._httpd.server_address)
    finally:
        server.stop()


@contextlib.contextmanager
def s3_server() -> Iterator[str]:
    """Its address."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    try:
        yield "http://127.0.0.1:{1}".format(*server.get_host_and_port())
    finally:
        server.stop()


@contextlib.contextmanager
def serving_bucket(kind: str, folder: Path) -> Iterator[Bucket]:
    """A store of its own that holds the files of a folder. kind: s3 or gs."""
    with s3_server() if kind == "s3" else google_server() as endpoint:
        bucket: Bucket = S3Bucket(endpoint) if kind == "s3" else GoogleBucket(endpoint)
        fill(bucket, folder)
        try:
            yield bucket
        finally:
            bucket.wipe()
