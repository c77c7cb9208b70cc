"""pipe:COMMAND: files from a shell command, only where the environment allows it.

A configuration may come from a stranger (a recipe, a run folder), so nothing that is read may decide this: there is no
setting for it, only the environment variable SIVAE_ALLOW_PIPE=1, which whoever starts the process sets.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import shlex
import signal
import subprocess
import time
from collections.abc import Iterator

from sivae_dist.data.faults import StorageError
from sivae_dist.data.manifest import FILE_NAME
from sivae_dist.data.stores.transport import Patience, TransientError
from sivae_dist.errors import UserError

VARIABLE = "SIVAE_ALLOW_PIPE"
_CHUNK = 1 << 18


class PipeTransport:
    """Runs COMMAND with {name} replaced by a file's name; it writes the whole file to its standard output."""

    manifest_name = FILE_NAME

    def __init__(self, url: str) -> None:
        self.command = url.removeprefix("pipe:").strip()
        self.url = f"pipe:{self.command.split()[0] if self.command else ''} ..."  # the rest may hold credentials
        if os.environ.get(VARIABLE) != "1":
            what = f"data.url {self.url!r:.120} would run a shell command, which is refused"
            raise UserError(what, f"give a folder or URL; if the command is yours, set {VARIABLE}=1 in the environment")
        if "{name}" not in self.command:
            raise UserError(f"data.url {self.url!r:.120} has no {{name}}", "write {name} where the file's name belongs")

    def open(
        self, name: str, offset: int, length: int | None, patience: Patience, *, most: int | None = None
    ) -> _Output:
        """Starts the command."""
        return _Output(self.command.replace("{name}", shlex.quote(name)), name, self.url, patience)

    def size(self, name: str, patience: Patience) -> int | None:
        """Bytes of a file, by reading all of it."""
        body = self.open(name, 0, None, patience)
        try:
            return sum(len(chunk) for chunk in body.chunks())
        finally:
            body.close()

    def close(self) -> None:
        """Nothing stays open."""


class _Output:
    """What the command writes."""

    ranged: bool = False
    settled: bool = False
    total: int | None = None

    def __init__(self, command: str, name: str, url: str, patience: Patience) -> None:
        self._name, self._url, self._patience = name, url, patience
        try:
            self._process = subprocess.Popen(
                ["/bin/sh", "-c", command],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        except OSError as error:
            raise StorageError(f"{url} cannot be started: {error.strerror}", "check the machine") from None

    def chunks(self) -> Iterator[bytes]:
        """The bytes as they come. Raises TransientError when the command fails, or says nothing for too long."""
        assert self._process.stdout is not None
        handle = self._process.stdout.fileno()
        with selectors.DefaultSelector() as ready:
            ready.register(handle, selectors.EVENT_READ)
            while True:
                self._patience.spend()
                if not ready.select(min(self._patience.read_s, self._patience.left())):
                    raise TransientError("no more bytes in time")
                data = os.read(handle, _CHUNK)
                if not data:
                    break
                yield data
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=min(self._patience.read_s, self._patience.left()))
        if self._process.returncode != 0:
            raise TransientError(f"the command ends with status {self._process.returncode}")

    def close(self) -> None:
        """Ends the command and what it has started."""
        if self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
        assert self._process.stdout is not None
        self._process.stdout.close()
        deadline = time.monotonic() + 5.0
        while self._process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
