"""Old builds go, builds in use and builds being made stay: the cache under real processes."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_build import FORK, Workshop, until, workshop

from sivae_dist.ops import _build, _cache

__all__ = ["workshop"]


def variant(workshop: Workshop, number: int) -> str:
    """Builds other sources; the name of the build. Later ones are used later."""
    workshop.source.write_text(f'extern "C" int answer() {{ return {number}; }}\n')
    library = _build.ensure("cpu").library
    os.utime(library.with_name(_build.RECORD), (1e9 + number, 1e9 + number))
    return library.parent.name


def builds(workshop: Workshop) -> set[str]:
    return {path.name for path in workshop.cache.iterdir() if path.is_dir()}


def _use(library: Path, ready: Path) -> None:
    assert _cache.hold(library)
    ready.touch()
    time.sleep(120)


def user(workshop: Workshop, name: str) -> multiprocessing.process.BaseProcess:
    """A process that has loaded this build and lives on."""
    ready = workshop.folder / f"ready-{name}"
    process = FORK.Process(target=_use, args=(workshop.cache / name / _build.LIBRARY, ready), daemon=True)
    process.start()
    until(ready.exists)
    return process


def end(process: multiprocessing.process.BaseProcess) -> None:
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join(10)


def test_the_newest_of_each_device_and_torch_are_kept(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.__version__", "2.12.0")
    other = variant(workshop, 0)
    monkeypatch.undo()
    for name, value in (("SIVAE_KERNEL_CACHE", workshop.cache), ("CXX", f"'{workshop.compiler}'")):
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr("sivae_dist.ops._toolchain.kernels_dir", lambda: workshop.folder / "sources")
    names = [variant(workshop, k) for k in range(1, _cache.KEPT + 3)]
    assert builds(workshop) == {other, *names[2:]}
    locks = {path.stem for path in workshop.cache.glob("*.lock")}
    assert locks == builds(workshop)  # nothing grows
    os.utime(workshop.cache / names[2] / _build.RECORD)  # used again
    last = variant(workshop, 99)
    assert builds(workshop) == {other, names[2], *names[4:], last}


def test_all_torches_together_are_bounded(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_cache, "KEPT_IN_ALL", 2)
    for number, version in enumerate(("2.11.0", "2.12.0", "2.13.0")):
        monkeypatch.setattr("torch.__version__", version)
        newest = variant(workshop, number)
    assert len(builds(workshop)) == 2 and newest in builds(workshop)


def test_what_a_process_uses_stays_until_it_is_dead(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_cache, "KEPT", 1)
    used = variant(workshop, 1)
    process = user(workshop, used)
    os.utime(workshop.cache / used / _build.RECORD, (1e9, 1e9))
    names = [variant(workshop, k) for k in (2, 3)]
    assert builds(workshop) == {used, names[-1]}
    end(process)
    last = variant(workshop, 4)
    assert builds(workshop) == {last}


def test_what_a_process_builds_stays_and_what_a_dead_one_left_goes(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_cache, "KEPT", 1)
    workshop.hold.touch()
    builder = workshop.start(0)
    until(lambda: workshop.compiled() == 1)
    (aside,) = workshop.left_behind()
    monkeypatch.setenv("CXX", "c++")  # not held up
    made = variant(workshop, 2)
    assert builds(workshop) == {made, aside}
    end(builder)
    last = variant(workshop, 3)
    assert builds(workshop) == {last}


def test_a_library_that_was_removed_is_not_held(workshop: Workshop) -> None:
    name = variant(workshop, 1)
    library = workshop.cache / name / _build.LIBRARY
    assert _cache.remove_old(workshop.cache, keep="another") == []  # the newest
    _cache._remove(workshop.cache, library.parent, name)
    assert not _cache.hold(library) and library not in _cache._HELD


def test_a_lock_that_was_removed_while_waiting_is_no_lock(tmp_path: Path) -> None:
    """Else the next one would lock a new file of that name, and both would build."""
    path = tmp_path / "build.lock"
    code = "import sys; from pathlib import Path; from sivae_dist.ops._cache import locked\npath = Path(sys.argv[1])\n"
    code += "print('asks', flush=True)\nwith locked(path): print(path.exists())"
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        # Not forked: a child would inherit the lock.
        process = subprocess.Popen([sys.executable, "-c", code, path], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None and process.stdout.readline() == "asks\n"
        time.sleep(0.3)
        path.unlink()
    told, _ = process.communicate(timeout=60)
    assert told == "True\n"
