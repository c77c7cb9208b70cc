"""A pyramid: one data set packed at several resolutions, FOLDER/256, FOLDER/512, ..., with the same samples in each.

Each sub-folder is a shard folder of its own; shard by shard they hold the same keys in the same order, so a position of
the plan is the same sample at every resolution.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sivae_dist.data.faults import DataError, RefusedError
from sivae_dist.data.manifest import FILE_NAME
from sivae_dist.data.shard_read import load_index, load_manifest
from sivae_dist.data.store import Access, open_store
from sivae_dist.data.stores.address import expand, scheme_of
from sivae_dist.errors import UserError

_USUAL_SIDES = tuple(2**n for n in range(3, 14))


def levels_of(folder: str | Path) -> tuple[Path, ...]:
    """The shard folders of a pyramid, the smallest resolution first; empty when the folder is no pyramid."""
    path = Path(str(folder).removeprefix("file://")).expanduser()
    if not str(folder) or not path.is_dir() or (path / FILE_NAME).is_file():
        return ()
    numbered = [p for p in path.iterdir() if p.name.isascii() and p.name.isdecimal() and len(p.name) < 9]
    return tuple(sorted((p for p in numbered if (p / FILE_NAME).is_file()), key=lambda p: int(p.name)))


def addresses_of(url: str) -> tuple[str, ...]:
    """The levels of a pyramid here or elsewhere, the smallest resolution first; empty for what is no pyramid.

    Servers do not list folders, so levels elsewhere are looked for by name: powers of two. Raises UserError.
    """
    if scheme_of(url) in ("", "file"):
        return tuple(str(level) for level in levels_of(url))
    access = Access(cache_gb=0)
    if not _may_be_root(url) or not _missing(url, access):
        return ()
    return tuple(level for side in _USUAL_SIDES if not _missing(level := _level(url, side), access))


def remote_level(url: str, side: int, access: Access, wants: str = "the model takes") -> str:
    """Where `url` is the root of a pyramid elsewhere, the address of its level of `side` pixels; else `url` as it is.

    Raises UserError when there are other levels but not this.
    """
    if not _may_be_root(url) or not _missing(url, access):
        return url
    if not _missing(wanted := _level(url, side), access):
        return wanted
    if there := [str(other) for other in _USUAL_SIDES if not _missing(_level(url, other), access)]:
        raise no_such_level(url, there, side, wants)
    return url


def _may_be_root(url: str) -> bool:
    """Whether an address may be that of a folder on a server: no file, no pattern, no command."""
    names_file = url.partition("?")[0].endswith((".json", ".tar"))
    return scheme_of(url) in ("http", "https", "s3", "gs") and not names_file and expand(url) == [url]


def _missing(url: str, access: Access) -> bool:
    """Whether there is no manifest at an address. Raises StorageError when the server does not say."""
    from sivae_dist.data.stores.remote import RemoteStore  # noqa: PLC0415 (local data need none of this)

    store = open_store(url, access)
    assert isinstance(store, RemoteStore)
    try:
        store.look(store.manifest_name)
    except RefusedError:
        return True
    except DataError as error:
        return error.reason == "missing"
    finally:
        store.close()
    return False


def _level(url: str, side: int) -> str:
    path, mark, query = url.partition("?")
    return f"{path.rstrip('/')}/{side}{mark}{query}"


def no_such_level(url: str, there: Sequence[str], side: int, wants: str = "the model takes") -> UserError:
    """The error for a pyramid without the level that is wanted."""
    what = f"{url} holds pictures of {', '.join(there)} pixels, {wants} {side}"
    return UserError(what, "pack the data at that resolution too, or set model.image_size to one of these")


def disagreements(levels: Sequence[Path | str]) -> list[str]:
    """How the levels differ in shards or keys, one line each; empty when they agree. Raises UserError."""
    first, *others = [(level, load_manifest(open_store(str(level)))) for level in levels]
    problems = []
    for level, manifest in others:
        left, right = ([(s.name, s.split, s.count) for s in m.shards] for m in (first[1], manifest))
        if left != right:
            problems.append(f"{level} has other shards than {first[0]}")
            continue
        stores = [open_store(str(place)) for place in (first[0], level)]
        for shards in zip(first[1].shards, manifest.shards, strict=True):
            indices = [load_index(store, s, first[1].classes) for store, s in zip(stores, shards, strict=True)]
            labels = [[row[3] for row in index.rows()] for index in indices]
            if indices[0].keys != indices[1].keys or labels[0] != labels[1]:
                problems.append(f"{level}/{shards[0].name} has other samples than {first[0]}/{shards[0].name}")
        for store in stores:
            store.close()
    return problems
