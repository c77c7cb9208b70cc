"""A pyramid: one data set packed at several resolutions, FOLDER/256, FOLDER/512, ..., with the same samples in each.

Each sub-folder is a shard folder of its own; shard by shard they hold the same keys in the same order, so a position of
the plan is the same sample at every resolution. FOLDER/pyramid.json tells which there are (`pyramid_file.py`). Data
packed before there was one are looked at: folders are listed, servers asked for the usual resolutions.

Who reads a level holds it against that file: a run the one that it takes, commands all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sivae_dist.data import pyramid_file
from sivae_dist.data.faults import DataError, RefusedError
from sivae_dist.data.manifest import FILE_NAME
from sivae_dist.data.pyramid_file import PyramidFile, read_pyramid
from sivae_dist.data.shard_read import load_index, load_manifest
from sivae_dist.data.store import Access, FolderStore, open_store
from sivae_dist.data.stores.address import expand, fill, scheme_of
from sivae_dist.errors import UserError
from sivae_dist.files import expanded

_USUAL_SIDES = tuple(2**n for n in range(3, 14))


def addresses_of(url: str, access: Access | None = None) -> tuple[str, ...]:
    """The levels of a pyramid here or elsewhere, the smallest resolution first; empty for what is no pyramid.

    Raises UserError where they are not what its pyramid.json lists. Without that file, levels on a server are looked
    for by name: powers of two.
    """
    url, access = _folder(url), access or Access(cache_gb=0)
    if not _is_root(url, access):
        return ()
    if (listed := _listed(url, access)) is None:
        if (path := _local_root(url)) is not None:
            return tuple(str(level) for level in _numbered(path))
        return tuple(level for side in _USUAL_SIDES if not _missing(level := _level(url, side), access))
    here = _local_root(url)
    for stray in _numbered(here) if here is not None else ():
        if int(stray.name) not in listed.resolutions:
            what = f"{stray} is not among the resolutions that {url.rstrip('/')}/{pyramid_file.FILE_NAME} lists"
            raise UserError(f"{what} ({_told(listed)})", "move it elsewhere, or pack all resolutions together")
    return tuple(_checked(url, listed, side, access) for side in listed.resolutions)


def level_for(url: str, side: int, access: Access, wants: str = "the model takes") -> str:
    """Where `url` is the root of a pyramid, the address of its level of `side` pixels; else `url` as it is.

    Raises UserError when there are other levels but not this, or when it is another one than pyramid.json lists.
    """
    given, url = url, _folder(url)
    if not _is_root(url, access):
        return given
    if (listed := _listed(url, access)) is not None:
        if side not in listed.resolutions:
            raise no_such_level(url, [str(other) for other in listed.resolutions], side, wants)
        return _checked(url, listed, side, access)
    if (path := _local_root(url)) is not None:
        there = [level.name for level in _numbered(path)]
    elif not _missing(_level(url, side), access):
        there = [str(side)]
    else:
        there = [str(other) for other in _USUAL_SIDES if not _missing(_level(url, other), access)]
    if there and str(side) not in there:
        raise no_such_level(url, there, side, wants)
    return _level(url, side) if there else given


def _folder(url: str) -> str:
    """An address, or that of the folder when it names the pyramid's file."""
    path, mark, query = _parts(url)
    return path.removesuffix(f"/{pyramid_file.FILE_NAME}") + mark + query


def _parts(url: str) -> tuple[str, str, str]:
    """Path, mark and query of an address; a path of this machine has no query."""
    return (url, "", "") if _is_local(url) else url.partition("?")


def _is_local(url: str) -> bool:
    return scheme_of(url) in ("", "file")


def _is_root(url: str, access: Access) -> bool:
    """Whether an address may be that of a pyramid: a folder without a manifest of its own."""
    if _is_local(url):
        return _local_root(url) is not None
    return _may_be_root(url) and _missing(url, access)


def _local_root(url: str) -> Path | None:
    """A folder of this machine without a manifest of its own."""
    path = expanded(fill(url, sent=False)[0].removeprefix("file://")) if _is_local(url) else None
    if not url or path is None or not path.is_dir() or (path / FILE_NAME).is_file():
        return None
    return path


def _numbered(path: Path) -> tuple[Path, ...]:
    """The shard folders in a folder that are called like a resolution, the smallest first."""
    numbered = [p for p in path.iterdir() if p.name.isascii() and p.name.isdecimal() and len(p.name) < 9]
    return tuple(sorted((p for p in numbered if (p / FILE_NAME).is_file()), key=lambda p: int(p.name)))


def _listed(url: str, access: Access) -> PyramidFile | None:
    """What the root of a pyramid says of it, None where it says nothing. Raises UserError."""
    path = _local_root(url)
    store = FolderStore(path) if path is not None else open_store(url, access)
    try:
        return read_pyramid(store)
    finally:
        store.close()


def _checked(url: str, listed: PyramidFile, side: int, access: Access) -> str:
    """The address of a level that is listed. Raises UserError where that is not there, or another one is."""
    level, file = _level(url, side), f"{_parts(url)[0].rstrip('/')}/{pyramid_file.FILE_NAME}"
    found, wanted = _fingerprint(level, access), listed.fingerprint(side)
    if found is None:
        what = f"{file} lists pictures of {_told(listed)} pixels, but there is no {level}/{FILE_NAME}"
        raise UserError(what, f"copy the folder {side} there, too, or pack the data set again")
    if found != wanted:
        what = f"{level} holds other data than {file} lists (fingerprint {found[:12]}, listed {wanted[:12]})"
        raise UserError(what, f"copy all resolutions again, or pack them together; or give {level} itself")
    return level


def _fingerprint(level: str, access: Access) -> str | None:
    """That of the manifest at an address, None where there is none. Raises UserError."""
    path = expanded(fill(level, sent=False)[0].removeprefix("file://")) if _is_local(level) else None
    if path is not None and not (path / FILE_NAME).is_file():
        return None
    store = open_store(level, access)
    try:
        return load_manifest(store).fingerprint
    except RefusedError:  # some servers say so of what is not there
        return None
    except DataError as error:
        if error.reason != "missing":
            raise
        return None
    finally:
        store.close()


def _told(listed: PyramidFile) -> str:
    return ", ".join(map(str, listed.resolutions))


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
    path, mark, query = _parts(url)
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
