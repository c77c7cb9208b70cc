"""logs/rank-N.log: what each rank went through, with times, for the day when something is wrong."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sivae_dist.errors import UserError

log = logging.getLogger("sivae_dist")


class _File(logging.FileHandler):
    """A log that cannot be written (a full disk) is not told on the terminal: what matters more fails there, too."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 (the library's name)
        """Drops the record."""


@contextmanager
def rank_log(folder: Path, rank: int) -> Iterator[None]:
    """Within, everything logged under `sivae_dist` goes to the rank's file (all lives of a run in one file).

    An exception that passes is logged with its traceback, which the terminal need not show. Raises UserError when the
    file cannot be written.
    """
    path = folder / f"rank-{rank}.log"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handler = _File(path, encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error}", "choose another place with --out") from error
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log.setLevel(logging.INFO)
    log.propagate = False  # the terminal has the progress line; warnings and errors reach it on their own ways
    log.addHandler(handler)
    try:
        yield
    except BaseException:
        log.exception("ended by")
        raise
    finally:
        log.removeHandler(handler)
        with contextlib.suppress(OSError):
            handler.close()
