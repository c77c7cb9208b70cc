"""Looking at a machine, an installation and a data set for what would stop a run or slow it down.

Everything is tried, not guessed: packages are imported, a process group is started, a GPU multiplies, pictures are
decoded. Nothing here needs anything but the standard library until a check tries it.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from sivae_dist import __version__
from sivae_dist.apps.checks import accelerate_config, devices, kernels, run_config, software, storage
from sivae_dist.apps.checks.base import Check, guarded, ok
from sivae_dist.errors import UserError


def examine(
    data: str | None,
    out: Path,
    accelerate_file: Path | None,
    cache_dir: str | None = None,
    cache_gb: float | None = None,
    *,
    config: Path | None = None,
    processes: int | None = None,
) -> list[Check]:
    """All checks, in the order of the report.

    data: shard folder; None: the configuration's, if there is one. cache_dir, cache_gb: as in a run's configuration;
    None: this one's. processes: that share the run's batch; None: one a GPU, or one.
    """
    looks: list[tuple[str, Callable[[], list[Check]]]] = [
        ("python", software.python),
        ("packages", software.packages),
        ("gpu", devices.gpus),
        ("gpu decode", devices.gpu_decode),
        ("c++ compiler", software.compilers),
        ("kernels", kernels.kernels),
        ("extension locks", software.extension_locks),
        ("groups", devices.groups),
        ("launch variables", accelerate_config.environment),
        (accelerate_config.NAME, functools.partial(accelerate_config.config, accelerate_file)),
        ("deepspeed", software.deepspeed),
        ("out folder", functools.partial(storage.out_folder, out)),
        ("/dev/shm", storage.shared_memory),
        ("open files", storage.open_files),
        ("memory", storage.memory),
        ("threads", devices.threads),
    ]
    own: tuple[str, str, float] | None = None
    if config is not None:
        looks.append((run_config.NAME, functools.partial(run_config.config, config, processes)))
        with contextlib.suppress(UserError):  # told by the look at the configuration
            own = run_config.data_of(config)
    url, folder, size = own or (None, "", 16.0)
    if url := data or url:
        folder, size = folder if cache_dir is None else cache_dir, size if cache_gb is None else cache_gb
        looks.append(("data", functools.partial(storage.data, url)))
        looks.append(("data cache", functools.partial(storage.data_cache, url, folder, size)))
    checks = [ok("sivae-dist", f"{__version__} in {Path(__file__).resolve().parents[1]}")]
    with _quiet():
        for name, look in looks:
            checks += guarded(name, look)
    return checks


def report(checks: list[Check]) -> str:
    """The checks as text: one line each, with the remedy below where something is off."""
    width = max(len(check.name) for check in checks)
    lines = []
    for check in checks:
        lines.append(f"{check.status:<8} {check.name:<{width}}  {check.found}")
        if check.status != "ok":
            lines.append(f"{'':<8} {'':<{width}}  fix: {check.remedy}")
    count = {status: sum(c.status == status for c in checks) for status in ("ok", "warning", "problem")}
    lines.append(f"{count['ok']} ok, {count['warning']} warnings, {count['problem']} problems")
    return "\n".join(lines)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Libraries log while they are imported; only the report should be seen. (Python's own streams only.)"""
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        before = sys.stderr
        sys.stderr = nowhere
        try:
            yield
        finally:
            sys.stderr = before
