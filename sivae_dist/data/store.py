"""Where a shard folder lies: the store behind data.url. The kinds of storage are in `sivae_dist/data/stores/`."""

from __future__ import annotations

from pathlib import Path

from sivae_dist.data.stores.address import expand, fill, parse, scheme_of
from sivae_dist.data.stores.base import Access, Store
from sivae_dist.data.stores.folder import FolderStore, open_folder
from sivae_dist.data.stores.pattern import JoinedStore, parts_of
from sivae_dist.errors import UserError

__all__ = ["Access", "FolderStore", "Store", "open_store"]


def open_store(url: str, access: Access | None = None) -> Store:
    """The store behind data.url: a folder, its manifest, or a brace pattern of folders or shards.

    On this machine (a path or file://), on a web server (http, https), in an object store (s3, gs). access: how remote
    files are read. Asks no server yet, except for a pattern. Raises UserError for what cannot be data.
    """
    access = access or Access()
    if not url:
        raise UserError("data.url is empty, expected the folder of a packed data set", "set --data.url FOLDER")
    if scheme_of(url) == "pipe" or _is_folder(url):
        return _open_one(url, access)
    places = expand(url)
    if len(places) > 1 or places[0].partition("?")[0].endswith(".tar"):
        return JoinedStore(url, parts_of(places), lambda folder: _open_one(folder, access))
    return _open_one(places[0], access)


def _is_folder(url: str) -> bool:
    """Whether a path that looks like a pattern is there as it stands."""
    try:
        return not scheme_of(url) and Path(url).is_dir()
    except OSError:
        return False


def _open_one(url: str, access: Access) -> Store:
    scheme = scheme_of(url)
    if scheme in ("", "file"):
        return open_folder(fill(url, sent=False)[0].removeprefix("file://"), url)
    from sivae_dist.data.stores.remote import RemoteStore  # noqa: PLC0415 (local data need none of this)

    if scheme == "pipe":
        from sivae_dist.data.stores.pipe import PipeTransport  # noqa: PLC0415

        return RemoteStore(PipeTransport(url), access)
    if scheme in ("http", "https"):
        from sivae_dist.data.stores.http import HttpTransport  # noqa: PLC0415

        return RemoteStore(HttpTransport(parse(url)), access)
    if scheme in ("s3", "gs"):
        from sivae_dist.data.stores.objects import ObjectTransport  # noqa: PLC0415

        return RemoteStore(ObjectTransport(parse(url)), access)
    raise UserError(
        f"data.url has scheme {scheme!r:.40}, expected a folder of this machine, http, https, s3 or gs",
        "copy or mount the data set on every machine and give that folder",
    )
