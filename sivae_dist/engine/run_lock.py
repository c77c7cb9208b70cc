"""One run at a time in one folder: two would overwrite each other's checkpoints and mix their metrics."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from pathlib import Path
from typing import IO

from sivae_dist.errors import UserError
from sivae_dist.files import try_lock

FILE_NAME = ".lock"
_WAIT_S = 3.0  # data workers of a run that was killed share its lock until they notice that it has gone


class RunLock:
    """Holds `.lock` of a run folder by flock, which the kernel gives back however the process ends.

    Raises UserError naming the process that holds it, or when the folder cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        path = folder / FILE_NAME
        try:
            self._file = open(path, "a+", encoding="utf-8")  # noqa: SIM115 (held for the run's life)
        except OSError as error:
            what = f"cannot write the run folder {folder}: {error.strerror}"
            raise UserError(what, "choose another place with --out, or mend the permissions") from error
        deadline = time.monotonic() + _WAIT_S
        while not try_lock(self._file, f"trains in {folder}"):
            if time.monotonic() > deadline:
                holder = _read(self._file)
                self._file.close()
                raise UserError(
                    f"another run is going on in {folder}{': ' + holder if holder else ''}",
                    "wait for it or stop it (Ctrl-C there saves a checkpoint), or choose another --out",
                )
            time.sleep(0.1)
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        try:
            self._file.flush()
        except OSError:  # a full disk: the lock holds all the same, only its text is missing
            os.ftruncate(self._file.fileno(), 0)

    def release(self) -> None:
        """Gives the folder back. The file stays: removing it would race with the next run."""
        with contextlib.suppress(OSError):
            self._file.close()


def _read(file: IO[str]) -> str:
    file.seek(0)
    return "".join(c for c in file.read(200) if c.isprintable())
