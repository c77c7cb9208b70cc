"""s3:// and gs://: object stores through fsspec (s3fs, gcsfs), with the credentials those libraries find."""

from __future__ import annotations

import importlib
import threading
from collections.abc import Iterator
from typing import Any

from sivae_dist.data.faults import DataError, RefusedError
from sivae_dist.data.stores import google
from sivae_dist.data.stores.address import Address
from sivae_dist.data.stores.transport import Patience, TransientError
from sivae_dist.errors import UserError

LIBRARIES = {"s3": ("s3fs", "pip install 'sivae-dist[s3]'"), "gs": ("gcsfs", "pip install 'sivae-dist[gs]'")}
_ATTEMPTS = 1  # attempts are counted in one place for all kinds of storage


class ObjectTransport:
    """A prefix of a bucket. Clients are made in the process that first asks: they do not survive a fork."""

    def __init__(self, address: Address) -> None:
        self.address, self.url, self.manifest_name = address, address.shown, address.manifest_name
        self._files: Any = None
        self._lock = threading.Lock()
        # gcsfs may be told by the environment to ask for parts at once: those behind the object's end would be errors.
        self._once = {"concurrency": 1} if address.scheme == "gs" else {}
        library, install = LIBRARIES[address.scheme]
        try:
            if address.scheme == "gs":
                google.load()
            else:
                importlib.import_module(library)
        except ImportError:
            what = f"data.url {self.url!r:.120} needs {library}, which is not installed"
            raise UserError(what, install) from None

    def open(self, name: str, offset: int, length: int | None, patience: Patience, *, most: int | None = None) -> _Body:
        """Asks for a range of an object. Raises TransientError, DataError or StorageError.

        The libraries hold the whole answer, so that nobody can stop reading when it becomes too long: no more than
        `most` bytes are asked for.
        """
        from fsspec.asyn import sync  # noqa: PLC0415

        files, path = self._client(patience), f"{self.address.base}/{name}"
        length = most if length is None else length
        end = None if length is None else offset + length
        try:
            data = sync(files.loop, files._cat_file, path, start=offset, end=end, timeout=patience.left(), **self._once)
        except Exception as error:
            raise self._meaning(error, name, offset) from None
        return _Body(data)

    def size(self, name: str, patience: Patience) -> int | None:
        """Bytes of an object."""
        from fsspec.asyn import sync  # noqa: PLC0415

        files = self._client(patience)
        try:
            found = sync(files.loop, files._info, f"{self.address.base}/{name}", timeout=patience.left())
        except Exception as error:
            raise self._meaning(error, name, 0) from None
        return int(found["size"])

    def close(self) -> None:
        """Forgets the client; the next request makes a new one."""
        self._files = None

    def _client(self, patience: Patience) -> Any:
        with self._lock:
            return self._files or self._connect(patience)

    def _connect(self, patience: Patience) -> Any:
        if self._files is None and self.address.scheme == "gs":
            self._files = google.connect(self.url, patience)
        elif self._files is None:
            import fsspec  # noqa: PLC0415

            waits = {"connect_timeout": patience.connect_s, "read_timeout": patience.read_s}
            options = waits | {"retries": {"total_max_attempts": _ATTEMPTS}}
            self._files = fsspec.filesystem(
                self.address.scheme, skip_instance_cache=True, use_listings_cache=False, config_kwargs=options
            )
            self._files.retries = _ATTEMPTS
        return self._files

    def _meaning(self, error: Exception, name: str, offset: int) -> Exception:
        """What a failure of the library means for us. Its text is shown without what was filled in."""
        where, kind = f"{self.url}/{name}", type(error).__name__
        if isinstance(error, FileNotFoundError):
            return DataError("missing", f"{where} is missing", "upload it again, or check bucket and prefix")
        if self.address.scheme == "gs":
            return google.meaning(error, where, offset, self.address.clean)
        if isinstance(error, PermissionError) or kind in ("NoCredentialsError", "PartialCredentialsError"):
            text = self.address.clean(str(error))
            return RefusedError(f"{where} is refused: {text}", "check the credentials of this process")
        code = str(getattr(error, "response", {}).get("Error", {}).get("Code", ""))
        if not code and getattr(error, "__cause__", None) is not None:
            code = str(getattr(error.__cause__, "response", {}).get("Error", {}).get("Code", ""))
        if code in ("InvalidRange", "416"):
            return DataError("truncated", f"{where} has no byte {offset}: it is shorter than packed", "upload it again")
        return TransientError(f"{kind}{f' {code}' if code else ''}: {self.address.clean(str(error))}")


class _Body:
    """An answer that is already here."""

    ranged: bool = True
    settled: bool = True
    total: int | None = None

    def __init__(self, data: bytes) -> None:
        self._data = data

    def chunks(self) -> Iterator[bytes]:
        """All of it."""
        yield self._data

    def close(self) -> None:
        """Nothing is open."""
