"""`sivae-dist doctor`: its own small parser, for it must run where other packages do not."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from pathlib import Path


def _gb(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1e7:
        raise argparse.ArgumentTypeError(f"{text} is not 0 to 10000000")
    return value


def _count(text: str) -> int:
    if not (text.isdecimal() and 1 <= int(text) <= 1 << 20):
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return int(text)


def run(arguments: list[str]) -> None:
    """Looks, reports, and ends with status 1 if there is a problem (warnings are none)."""
    parser = argparse.ArgumentParser(
        prog="sivae-dist doctor",
        description="Look at the machine, the installation and your data for what would stop a run.",
        epilog="Status 0: no problem (there may be warnings). Status 1: a problem.",
    )
    parser.add_argument("--json", action="store_true", help="print a list of checks for programs")
    parser.add_argument(
        "--config", metavar="FILE", type=Path, help="also look at this run: its settings, memory, data and cache"
    )
    parser.add_argument("--processes", metavar="N", type=_count, help="that share the run's batch (one a GPU, or one)")
    parser.add_argument("--data", metavar="FOLDER", help="also look at this packed data set (instead of the config's)")
    parser.add_argument("--cache-dir", metavar="FOLDER", help="data.cache_dir of the run, for data elsewhere")
    parser.add_argument("--cache-gb", metavar="GB", type=_gb, help="data.cache_gb of the run (16)")
    parser.add_argument("--out", metavar="FOLDER", default="runs", type=Path, help="where runs will be written (runs)")
    parser.add_argument("--accelerate-config", metavar="FILE", type=Path, help="instead of the user's default one")
    options = parser.parse_args(arguments)

    from sivae_dist.apps import doctor  # noqa: PLC0415 (--help stays quick)

    checks = doctor.examine(
        options.data,
        options.out,
        options.accelerate_config,
        options.cache_dir,
        options.cache_gb,
        config=options.config,
        processes=options.processes,
    )
    text = json.dumps([dataclasses.asdict(c) for c in checks], indent=1) if options.json else doctor.report(checks)
    print(text, flush=True)
    sys.stderr.flush()
    # Not sys.exit: a check that hung has left a thread behind.
    os._exit(int(any(check.status == "problem" for check in checks)))
