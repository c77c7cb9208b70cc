"""logs/rank-N.log: what each rank went through, with times, for the day when something is wrong."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sivae_dist.errors import UserError

log = logging.getLogger("sivae_dist")


@contextmanager
def rank_log(folder: Path, rank: int) -> Iterator[None]:
    """Within, everything logged under `sivae_dist` goes to the rank's file (all lives of a run in one file).

    An exception that passes is logged with its traceback, which the terminal need not show. Raises UserError when the
    file cannot be written.
    """
    path = folder / f"rank-{rank}.log"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handler = logging.FileHandler(path, encoding="utf-8")
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
        handler.close()
