"""A folder of this machine (or one that is mounted on it)."""

from __future__ import annotations

import errno
import os
import stat
from collections import OrderedDict
from pathlib import Path

from sivae_dist.data.faults import DataError, StorageError
from sivae_dist.data.manifest import FILE_NAME
from sivae_dist.data.pyramid_file import several
from sivae_dist.data.stores.base import NoMemory
from sivae_dist.errors import UserError
from sivae_dist.files import expanded

_OPEN_FILES = 256  # a rank with all 128 lanes has up to two shards open per lane


class FolderStore(NoMemory):
    """A folder of this machine. File handles are kept open, the least recently used one closes first."""

    def __init__(self, folder: Path, manifest_name: str = FILE_NAME) -> None:
        super().__init__()
        self.folder, self.url, self.manifest_name = folder, str(folder), manifest_name
        self._open: OrderedDict[str, int] = OrderedDict()

    def size(self, name: str) -> int:
        """Bytes of a file. Raises UserError when it is missing or unreadable."""
        return os.fstat(self._handle(name)).st_size

    def read(self, name: str, offset: int, length: int) -> bytes:
        """A range of a file, shorter than `length` only at the file's end. Raises UserError."""
        handle = self._handle(name)
        try:
            data = os.pread(handle, length, offset)
            while len(data) < length and (more := os.pread(handle, length - len(data), offset + len(data))):
                data += more
        except OSError as error:
            raise self._unreadable(name, error) from None
        return data

    def whole(self, name: str, limit: int) -> bytes:
        """A small file, whole. Raises UserError, also when it has more than `limit` bytes."""
        if (size := self.size(name)) > limit:
            what = f"{self.folder / name} has {size} bytes, more than {limit}"
            raise DataError("truncated", what, "copy the file again, or pack the data set again")
        return self.read(name, 0, size)

    def renew(self, name: str) -> None:
        """Closes the file: another one may lie there by now."""
        if (handle := self._open.pop(name, None)) is not None:
            os.close(handle)

    def close(self) -> None:
        """Closes all file handles; the store may be used again afterwards."""
        while self._open:
            os.close(self._open.popitem()[1])

    def _handle(self, name: str) -> int:
        if name in self._open:
            self._open.move_to_end(name)
            return self._open[name]
        while len(self._open) >= _OPEN_FILES:
            os.close(self._open.popitem(last=False)[1])
        path = self.folder / name
        try:
            # A pipe (an archive from a stranger may have one) would be waited for until somebody writes to it.
            handle = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0))
        except OSError as error:
            if error.errno == errno.EMFILE and self._open:  # a low limit of open files: live with fewer
                os.close(self._open.popitem(last=False)[1])
                return self._handle(name)
            raise self._unreadable(name, error) from None
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            os.close(handle)
            raise DataError("missing", f"{path} is no plain file", "copy the file again, or pack the data set again")
        self._open[name] = handle
        return handle

    def _unreadable(self, name: str, error: OSError) -> UserError:
        if isinstance(error, FileNotFoundError):
            what = f"{self.folder / name} is missing"
            return DataError("missing", what, "copy the file again, or pack the data set again")
        return StorageError(
            f"{self.folder / name} cannot be read: {error.strerror}", "check the disk and the permissions"
        )


def open_folder(path: str, shown: str) -> FolderStore:
    """A shard folder, or the manifest in it. shown: as the user wrote it. Raises UserError for anything else."""
    folder = expanded(path)
    if folder.suffix == ".json" and folder.is_file():
        return FolderStore(folder.parent, folder.name)
    if not folder.is_dir():
        raise UserError(f"data.url {shown!r:.200} is no folder", "check the path; it must exist on every machine")
    if not (folder / FILE_NAME).is_file():
        if packed := [p.parent.name for p in folder.glob(f"*/{FILE_NAME}")]:
            raise several(str(folder), packed)
        if (folder / ".pack").is_dir():
            raise UserError(f"{folder} is only partly packed", "run the same `sivae-dist data pack` again to finish it")
        raise UserError(f"{folder} holds no {FILE_NAME}", f"pack it: sivae-dist data pack {folder} DESTINATION ...")
    return FolderStore(folder)
