"""Two hosts with one cache on a file system whose locks end at each of them: neither takes away what is the other's."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from test_build import FORK, Workshop, finish, until, workshop
from test_old_builds import builds, variant

from sivae_dist.ops import _build, _cache, _toolchain

__all__ = ["workshop"]


def _work(host: str, outcome: Path) -> None:
    seen = _build.locked
    _cache.host = lambda: host
    _build.locked = lambda path: seen(path.with_name(f"{host}-{path.name}"))
    Workshop._work(outcome)


def test_both_build_at_the_same_time(workshop: Workshop) -> None:
    workshop.hold.touch()
    processes = []
    for number, host in enumerate(("one", "two")):
        processes.append(FORK.Process(target=_work, args=(host, workshop.folder / f"outcome-{number}")))
        processes[-1].start()
        until(lambda number=number: workshop.compiled() == number + 1)
    assert len(workshop.left_behind()) == 2
    workshop.hold.unlink()
    finish(processes)
    (library,) = set(workshop.outcomes())
    assert Path(library).is_file() and workshop.left_behind() == []


def test_whose_build_is_there_first_serves_both(workshop: Workshop) -> None:
    made, folder = _toolchain.recipe("cpu"), workshop.cache / "cpu-0123456789abcdef"
    workshop.cache.mkdir()
    library = _build.build(made, folder).library
    first = library.stat().st_ino
    assert _build.build(made, folder).library == library
    assert library.stat().st_ino == first and workshop.left_behind() == []


def left_overs(workshop: Workshop, name: str) -> dict[str, Path]:
    """What builders left: of this host, of another one now and long ago, of a version that did not say which."""
    found = {}
    for which, host in (("ours", _cache.host()), ("fresh", "elsewhere"), ("old", "elsewhere"), ("unknown", "")):
        found[which] = workshop.cache / f".{name}.{host}.{which}".replace("..unknown", ".12345")
        found[which].mkdir(parents=True)
    long_ago = time.time() - _cache.ABANDONED_S - 60
    os.utime(found["old"], (long_ago, long_ago))
    return found


@pytest.mark.parametrize("same", [True, False], ids=["same build", "another build"])
def test_what_another_host_may_still_be_making_stays(workshop: Workshop, same: bool) -> None:
    left = left_overs(workshop, _build._name(_toolchain.recipe("cpu")) if same else "cpu-0123456789abcdef")
    _build.ensure("cpu")
    assert {which for which, path in left.items() if path.exists()} == {"fresh", "unknown"}


def test_what_another_host_has_used_goes_by_age(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the day of its last use there. What only this host has used goes at once, since its locks tell."""
    monkeypatch.setattr(_cache, "KEPT", 1)
    both = variant(workshop, 1)
    library = workshop.cache / both / _build.LIBRARY
    with monkeypatch.context() as patch:
        patch.setattr(_cache, "host", lambda: "elsewhere")
        patch.setattr(_cache, "_HELD", {})
        assert _cache.hold(library)
    variant(workshop, 2)
    unmarked = variant(workshop, 3)
    assert builds(workshop) == {both, unmarked}
    (workshop.cache / unmarked / f"{_cache._USED}{_cache.host()}").unlink()  # as those of older versions
    os.utime(workshop.cache / both / _build.RECORD, (1e9, 1e9))
    os.utime(workshop.cache / unmarked / _build.RECORD)
    last = variant(workshop, 4)
    assert builds(workshop) == {both, unmarked, last}
    long_ago = time.time() - _cache.USED_S - 60
    os.utime(library.parent / f"{_cache._USED}elsewhere", (long_ago, long_ago))
    os.utime(workshop.cache / unmarked / _build.RECORD, (long_ago, long_ago))
    newest = variant(workshop, 5)
    assert builds(workshop) == {newest}
