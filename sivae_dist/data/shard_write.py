"""Writing a shard: a plain USTAR tar that any tool reads, and an index that makes it random access.

The bytes depend on the samples only: times, owners and modes are fixed, members follow each other in order.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tarfile
import zlib
from pathlib import Path
from typing import Any

from sivae_dist.data.manifest import ShardInfo
from sivae_dist.files import sync

INDEX_FORMAT = "sivae-index"
INDEX_VERSION = 1
BLOCK = tarfile.BLOCKSIZE


def member_header(name: str, size: int) -> bytes:
    """The 512-byte USTAR header of a regular file. Raises ValueError for a name USTAR cannot hold."""
    info = tarfile.TarInfo(name)
    info.size, info.mode, info.mtime = size, 0o644, 0
    return info.tobuf(tarfile.USTAR_FORMAT, "ascii", "strict")


class ShardWriter:
    """Writes NAME.tar and NAME.index aside in `aside` and moves both to `folder` when finished.

    Memory: one index line per sample. Not finished (or `abort`ed), it leaves nothing in `folder`.
    """

    def __init__(self, folder: Path, name: str, split: str, aside: Path) -> None:
        self.folder, self.name, self.split = folder, name, split
        self._paths = [aside / f"{name}.{end}.{os.getpid()}.tmp" for end in ("tar", "index")]
        self._file = open(self._paths[0], "wb")  # noqa: SIM115 - closed by finish or abort
        self._hash, self._position = hashlib.sha256(), 0
        self._lines: list[str] = []

    def add(self, key: str, extension: str, image: bytes, label: int | None, meta: dict[str, Any]) -> None:
        """Appends a sample: KEY.extension, KEY.json when there are facts, KEY.cls when there is a label."""
        offset = self._member(f"{key}.{extension}", image)
        if meta or label is not None:
            facts = dict(meta) if label is None else meta | {"label": label}
            self._member(f"{key}.json", json.dumps(facts, sort_keys=True, separators=(",", ":")).encode())
        if label is not None:
            self._member(f"{key}.cls", str(label).encode())
        self._lines.append(json.dumps([key, offset, len(image), zlib.crc32(image), label], separators=(",", ":")))

    def finish(self) -> ShardInfo:
        """Closes, fsyncs and moves both files into place."""
        # Two empty blocks end an archive; tar tools expect whole records.
        self._write(bytes(2 * BLOCK))
        self._write(bytes(-self._position % tarfile.RECORDSIZE))
        self._sync(self._file)
        head = {"format": INDEX_FORMAT, "version": INDEX_VERSION, "count": len(self._lines), "bytes": self._position}
        index = "".join(f"{line}\n" for line in [json.dumps(head), *self._lines]).encode()
        with open(self._paths[1], "wb") as file:
            file.write(index)
            self._sync(file)
        for path, end in zip(self._paths, ("tar", "index"), strict=True):
            os.replace(path, self.folder / f"{self.name}.{end}")
        sync(self.folder)
        return ShardInfo(
            name=self.name,
            split=self.split,
            count=len(self._lines),
            bytes=self._position,
            sha256=self._hash.hexdigest(),
            index_sha256=hashlib.sha256(index).hexdigest(),
        )

    def abort(self) -> None:
        """Drops what was written."""
        with contextlib.suppress(OSError):  # what is still buffered does not fit on a full disk either
            self._file.close()
        for path in self._paths:
            path.unlink(missing_ok=True)

    def _member(self, name: str, data: bytes) -> int:
        self._write(member_header(name, len(data)))
        offset = self._position
        self._write(data)
        self._write(bytes(-len(data) % BLOCK))
        return offset

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._hash.update(data)
        self._position += len(data)

    @staticmethod
    def _sync(file: Any) -> None:
        file.flush()
        os.fsync(file.fileno())
        file.close()
