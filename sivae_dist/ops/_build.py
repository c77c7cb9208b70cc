"""Kernels built where they run: once a machine, kept in a cache, safe against killed builders and damaged files.

The cache holds one folder a build, named by the hash of all its inputs (`Recipe.key`). A folder is made aside and
renamed when it is complete, so what is there is whole; its record holds the library's hash, so what was damaged later
is built again. `_cache` keeps builders apart and removes what is old.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import shlex
import shutil
import stat
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from sivae_dist.ops import _cache
from sivae_dist.ops._cache import LIBRARY, RECORD, locked
from sivae_dist.ops._toolchain import Device, Recipe, UnavailableError, recipe

REPORT = "report.txt"  # what the compilers said; for CUDA with registers and spills of every kernel
_FAILED_FRESH_S = 600.0  # who waited for a build that failed takes its word; a later process tries anew
_ERROR = re.compile(r"\berror\s*:|\bld: ")  # as g++, clang++, nvcc, ptxas and the linkers write it

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Built:
    """A finished build."""

    library: Path
    key: str
    facts: dict[str, str]


def cache_folder() -> Path:
    """Where builds are kept: $SIVAE_KERNEL_CACHE, else below the user's cache folder."""
    if given := os.environ.get("SIVAE_KERNEL_CACHE"):
        return Path(given)
    try:
        below = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:  # a user without a home, as containers have
        return _private(create=True) or Path(tempfile.gettempdir())
    return below / "sivae_dist" / "kernels"


def find(made: Recipe) -> Built | None:
    """The finished build of a recipe, if the cache holds it and it is whole."""
    for root in (cache_folder(), _private(create=False)):
        if root is not None and (built := _whole(root / _name(made), made)):
            return built
    return None


def ensure(device: Device) -> Built:
    """The build for a device here: from the cache, or made now (by one process, while the others wait).

    Raises UnavailableError with the compiler's first error and the remedy.
    """
    made = recipe(device)
    if built := find(made):
        return built
    started = time.time()
    root = _writable(cache_folder())
    name = _name(made)
    with locked(root / f"{name}.lock"):
        if built := _whole(root / name, made):
            return built
        _take_failure(root / f"{name}.failed", started)
        try:
            built = build(made, root / name)
        except UnavailableError as error:
            with contextlib.suppress(OSError):
                (root / f"{name}.failed").write_text(json.dumps({"why": error.why, "fix": error.fix}))
            raise
    with contextlib.suppress(OSError):  # another user's files, for instance
        _cache.remove_old(root, keep=name)
    return built


def build(made: Recipe, folder: Path) -> Built:
    """Compiles and links aside, then renames to `folder`. The caller holds the lock.

    A whole build that another host, whose lock may not be seen here, has put there in the meantime is used instead.
    Raises UnavailableError with the compiler's first error.
    """
    _cache.remove_abandoned(folder)
    # A warning only so that it is seen: a minute or two of silence look like a hang.
    log.warning("building the %s kernels, once for this machine, in %s", made.device, folder)
    began = time.monotonic()
    aside = _cache.aside(folder)
    try:
        aside.mkdir()
        (aside / "build.ninja").write_text(ninja_file(made))
        done = subprocess.run([made.ninja], cwd=aside, capture_output=True, text=True, check=False)
        report = "".join(path.read_text(errors="replace") for path in sorted(aside.glob("*.log")))
        (aside / REPORT).write_text(report + done.stdout)
        if done.returncode:
            raise UnavailableError(*_first_error(made, report + done.stdout + done.stderr))
        seconds = round(time.monotonic() - began, 1)
        record = {"sha256": _sha256(aside / LIBRARY), "seconds": seconds, **made.facts}
        (aside / RECORD).write_text(json.dumps(record, indent=1) + "\n")
        _cache.mark(aside)
        _put(aside, folder, made)
    except OSError as error:
        raise UnavailableError(
            f"the kernels could not be built in {folder.parent}: {error}",
            "make room there, or set SIVAE_KERNEL_CACHE to another folder",
        ) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    log.info("built the %s kernels in %.1f s", made.device, seconds)
    return Built(folder / LIBRARY, made.key, made.facts)


def _put(aside: Path, folder: Path, made: Recipe) -> None:
    try:
        aside.rename(folder)
    except OSError:  # there is one: another host's, or a damaged one
        if _whole(folder, made) is None:
            shutil.rmtree(folder, ignore_errors=True)
            aside.rename(folder)


def ninja_file(made: Recipe) -> str:
    """The build as ninja reads it. What each compiler says is kept in a .log beside its object."""

    def words(parts: list[str] | tuple[str, ...]) -> str:
        return " ".join(shlex.quote(part) for part in parts).replace("$", "$$")

    compiler = words(made.compiler)
    lines = [
        "ninja_required_version = 1.3",
        f"flags = {words(made.flags)}",
        f"link = {words(made.link)}",
        "rule compile",
        f"  command = {compiler} $flags -MMD -MF $out.d -c $in -o $out > $out.log 2>&1 || (cat $out.log; exit 1)",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {compiler} $in -o $out $link",
    ]
    objects = []
    for source in made.sources:
        objects.append(f"{source.parent.name}-{source.stem}.o")
        path = str(source).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")
        lines.append(f"build {objects[-1]}: compile {path}")
    lines.append(f"build {LIBRARY}: link {' '.join(objects)}")
    return "\n".join([*lines, f"default {LIBRARY}", ""])


def _name(made: Recipe) -> str:
    return f"{made.device}-{made.key}"


def _whole(folder: Path, made: Recipe) -> Built | None:
    """The build in a folder if its record says it is this one and the library is what the record says."""
    try:
        record = json.loads((folder / RECORD).read_text())
        library = folder / LIBRARY
        if {k: record.get(k) for k in made.facts} == made.facts and record["sha256"] == _sha256(library):
            return Built(library, made.key, made.facts)
        log.warning("the kernels in %s are damaged and are built again", folder)
    except FileNotFoundError:
        pass
    except (OSError, ValueError, KeyError, AttributeError) as error:
        log.warning("the kernels in %s cannot be read (%s) and are built again", folder, error)
    return None


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _writable(folder: Path) -> Path:
    """The cache folder, or a private temporary one when it cannot be written (told once by the caller's log)."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        instead = _private(create=True)
        assert instead is not None
        log.warning("the kernel cache %s cannot be written (%s); using %s", folder, error.strerror, instead)
        return instead


def _private(*, create: bool) -> Path | None:
    """A folder for this user's builds below the temporary folder; another user's of the same name is never used."""
    folder = Path(tempfile.gettempdir()) / f"sivae_dist-kernels-{os.getuid()}"
    with contextlib.suppress(OSError):
        if create:
            folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
        others = stat.S_IWGRP | stat.S_IWOTH
        if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & others:
            return folder
    return Path(tempfile.mkdtemp(prefix="sivae_dist-kernels-")) if create else None


def _take_failure(path: Path, started: float) -> None:
    """Raises what another process met while this one waited for it; an older failure is forgotten."""
    try:
        # One that failed before this process asked may have been mended since.
        if path.stat().st_mtime >= started and time.time() - path.stat().st_mtime < _FAILED_FRESH_S:
            told = json.loads(path.read_text())
            raise UnavailableError(str(told["why"]), str(told["fix"]))
    except (OSError, ValueError, KeyError):
        pass
    path.unlink(missing_ok=True)


def _first_error(made: Recipe, output: str) -> tuple[str, str]:
    """(why, fix) from what the compilers, then ninja, printed."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    first = next((line for line in lines if _ERROR.search(line)), lines[-1] if lines else "no message")
    return (
        f"{Path(made.compiler[0]).name} could not build the {made.device} kernels: {first[:500]}",
        "`sivae-dist doctor` looks at the compilers; without them set kernels.mode to auto or reference",
    )
