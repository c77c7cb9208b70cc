"""What can be told of the block cache before a run reads through it: whose it is, whether it can be written, its room.

A cache that others may write to ends the run; without one, or with a small one, it is only slower.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import dataclass

from sivae_dist.data.stores.address import scheme_of
from sivae_dist.data.stores.base import Access, Events
from sivae_dist.data.stores.cache import BlockCache, refuse_shared
from sivae_dist.files import size_of

_GB = 1e9
_WORTH = 0.2 * _GB  # a cache below this is hardly one


@dataclass(frozen=True)
class Remark:
    """Something that makes a run slower. remedy: what to do about it."""

    what: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.what}. {self.remedy[:1].upper()}{self.remedy[1:]}"


def uses_cache(url: str, access: Access) -> bool:
    """Whether what lies there is read through a cache: everything that is not on this machine."""
    return scheme_of(url) not in ("", "file") and int(access.cache_gb * _GB) > 0


def check_cache(url: str, access: Access) -> None:
    """Raises UserError where the run would be refused its cache. Writes nothing."""
    if uses_cache(url, access):
        refuse_shared(access.cache_folder())


def remarks(url: str, access: Access, size: float) -> list[Remark]:
    """What will slow down reading `size` bytes of shards through the cache. Writes nothing that stays."""
    if not uses_cache(url, access):
        return []
    folder = access.cache_folder()
    place = folder  # the folder, or the one in which it and those above it will be made
    while not os.path.exists(place):
        place = place.parent
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(b"x")
            file.flush()
        free = shutil.disk_usage(place).free
    except OSError as error:
        what = f"the data cache {folder} cannot be written ({place}: {error.strerror})"
        what = f"{what}: each picture that it does not hold will be a request"
        return [Remark(what, "set data.cache_dir to a folder that can be written, or data.cache_gb to 0")]
    held = BlockCache(folder, 1, Events()).held()
    wanted = min(access.cache_gb * _GB, size)
    if free + held >= wanted:
        return []
    room = free + held
    what = f"the data cache {folder} has room for {size_of(room)} ({size_of(free)} free, {size_of(held)} in use)"
    told = f"{what} of the {size_of(wanted)} it may take: when the disk is full, each picture will be a request"
    smaller = f", set data.cache_gb to {0.9 * room / _GB:.2g}" if room >= _WORTH else ""
    return [Remark(told, f"make room{smaller}, or set data.cache_dir to a folder on a larger disk")]


def described(access: Access) -> str:
    """The cache in a few words, for reports."""
    folder = access.cache_folder()
    return f"{folder}: {size_of(BlockCache(folder, 1, Events()).held())} in use of {access.cache_gb:g} GB"
