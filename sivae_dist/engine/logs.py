"""logs/rank-N.log: what each rank went through, with times, for the day when something is wrong."""

from __future__ import annotations

import logging
from pathlib import Path

log = logging.getLogger("sivae_dist")


def open_rank_log(folder: Path, rank: int) -> logging.Handler:
    """Sends everything logged under `sivae_dist` to the rank's file (appended: all lives of a run in one file)."""
    handler = logging.FileHandler(folder / f"rank-{rank}.log", encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log.setLevel(logging.INFO)
    log.addHandler(handler)
    log.propagate = False  # the terminal has the progress line; warnings and errors reach it on their own ways
    return handler


def close_rank_log(handler: logging.Handler) -> None:
    """Ends what `open_rank_log` began."""
    log.removeHandler(handler)
    handler.close()
