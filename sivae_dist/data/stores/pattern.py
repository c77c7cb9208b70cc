"""Several folders, or some shards of them, as one shard folder: what a brace pattern in data.url stands for."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

from sivae_dist.data.manifest import ShardInfo
from sivae_dist.data.stores.base import Events, Expected, Store, read_manifest
from sivae_dist.errors import UserError

_SAME = ("resolution", "channels", "classes", "class_names", "image_format")


class JoinedStore:
    """The files of several stores under names of one folder. It makes up that folder's manifest."""

    def __init__(self, url: str, parts: Mapping[str, list[str] | None], opener: Callable[[str], Store]) -> None:
        """parts: folder -> shards that are wanted of it, None for all. Raises UserError when they do not fit."""
        self.url = url
        self._events = Events()
        self._places: dict[str, tuple[Store, str]] = {}
        self._stores = [opener(folder) for folder in parts]
        manifests = [read_manifest(store) for store in self._stores]
        first = manifests[0]
        shards: list[ShardInfo] = []
        for number, (store, manifest, wanted) in enumerate(zip(self._stores, manifests, parts.values(), strict=True)):
            for field in _SAME:
                if (value := getattr(manifest, field)) != (expected := getattr(first, field)):
                    what = f"{store.url} has {field} {value!r:.80}, {self._stores[0].url} has {expected!r:.80}"
                    raise UserError(what, "a pattern joins data of one kind; pack them alike")
            known = {shard.name: shard for shard in manifest.shards}
            if missing := [name for name in wanted or () if name not in known]:
                what = f"{store.url} has no shard {missing[0]!r:.120} ({len(missing)} named by data.url are not there)"
                raise UserError(what, "correct the range; `sivae-dist data info` counts the shards")
            for shard in manifest.shards if wanted is None else [known[name] for name in wanted]:
                name = shard.name if len(parts) == 1 else f"{number}-{shard.name}"
                shards.append(dataclasses.replace(shard, name=name))
                for end in ("tar", "index"):
                    self._places[f"{name}.{end}"] = store, f"{shard.name}.{end}"
        self.manifest_name = self._stores[0].manifest_name
        self._manifest = dataclasses.replace(first, shards=tuple(shards)).to_bytes()

    @property
    def events(self) -> Events:
        """What the stores met since somebody looked."""
        for store in self._stores:
            met = store.events.take()
            self._events.counts += met.counts
            self._events.notes += met.notes
        return self._events

    def expect(self, files: Mapping[str, Expected]) -> None:
        """Passes on what the manifest says of each file, under its own name."""
        for name, expected in files.items():
            if name in self._places:
                store, own = self._places[name]
                store.expect({own: expected})

    def size(self, name: str) -> int:
        """Bytes of a file."""
        if name == self.manifest_name:
            return len(self._manifest)
        store, own = self._places[name]
        return store.size(own)

    def read(self, name: str, offset: int, length: int) -> bytes:
        """A range of a file."""
        if name == self.manifest_name:
            return self._manifest[offset : offset + length]
        store, own = self._places[name]
        return store.read(own, offset, length)

    def whole(self, name: str, limit: int) -> bytes:
        """A small file, whole; the manifest is made up of those of the parts."""
        if name == self.manifest_name:
            return self._manifest
        store, own = self._places[name]
        return store.whole(own, limit)

    def forget(self, name: str, offset: int, length: int) -> bool:
        """Is told that these bytes are damaged."""
        store, own = self._places[name]
        return store.forget(own, offset, length)

    def renew(self, name: str) -> None:
        """Is told that a file will be asked for again."""
        store, own = self._places[name]
        store.renew(own)

    def prepare(self, wanted: Sequence[tuple[str, int, int]]) -> None:
        """Passes on what will be read to the parts."""
        for store in self._stores:
            own = [(self._places[name], offset, length) for name, offset, length in wanted if name in self._places]
            store.prepare([(place[1], offset, length) for place, offset, length in own if place[0] is store])

    def close(self) -> None:
        """Closes all parts."""
        for store in self._stores:
            store.close()


def parts_of(places: list[str]) -> dict[str, list[str] | None]:
    """Folder -> shards wanted of it (None: all), from addresses of folders, manifests and .tar files."""
    found: dict[str, list[str] | None] = {}
    for place in places:
        path, mark, query = place.partition("?")
        if not path.endswith(".tar"):
            found[place] = None
            continue
        folder, _, shard = path.rpartition("/")
        folder = (folder or ".") + mark + query
        wanted = found.setdefault(folder, [])
        if wanted is not None and (name := shard.removesuffix(".tar")) not in wanted:
            wanted.append(name)
    return found
