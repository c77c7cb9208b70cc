"""The cache of built kernels under real processes: several at once, killed ones, damage, missing and broken parts."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sivae_dist.ops import _build, _toolchain
from sivae_dist.ops._toolchain import UnavailableError

FORK = multiprocessing.get_context("fork")
SOURCE = 'extern "C" int answer() { return 42; }\n'
BROKEN = SOURCE + "int broken = nowhere;\nint more = nowhere;\n"


class Workshop:
    """A small folder of sources, a compiler that keeps count and can be held up, a cache."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.cache, self.hold = folder, folder / "cache", folder / "hold"
        self.source, self.count = folder / "sources/tiny/tiny_cpu.cpp", folder / "count"
        self.source.parent.mkdir(parents=True)
        self.source.write_text(SOURCE)
        self.compiler = folder / "counting c++"
        lines = [
            "#!/bin/sh",
            f'case "$*" in *" -c "*) echo $$ >> "{self.count}"; while [ -e "{self.hold}" ]; do sleep 0.02; done;; esac',
            'exec c++ "$@"',
        ]
        self.compiler.write_text("\n".join(lines) + "\n")
        self.compiler.chmod(0o755)

    def compiled(self) -> int:
        return len(self.count.read_text().split()) if self.count.exists() else 0

    def start(self, number: int) -> multiprocessing.process.BaseProcess:
        """A process that wants the build; its outcome goes to a file."""
        process = FORK.Process(target=self._work, args=(self.folder / f"outcome-{number}",))
        process.start()
        return process

    @staticmethod
    def _work(outcome: Path) -> None:
        try:
            outcome.write_text(str(_build.ensure("cpu").library))
        except UnavailableError as error:
            outcome.write_text(f"unavailable: {error.why}")

    def outcomes(self) -> list[str]:
        return [path.read_text() for path in sorted(self.folder.glob("outcome-*"))]

    def left_behind(self) -> list[str]:
        return [path.name for path in self.cache.iterdir() if path.name.startswith(".")]


@pytest.fixture
def workshop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Workshop]:
    made = Workshop(tmp_path)
    monkeypatch.setattr(_toolchain, "kernels_dir", lambda: tmp_path / "sources")
    monkeypatch.setenv("SIVAE_KERNEL_CACHE", str(made.cache))
    monkeypatch.setenv("CXX", f"'{made.compiler}'")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    yield made
    made.hold.unlink(missing_ok=True)


def until(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.02)


def finish(processes: list[multiprocessing.process.BaseProcess]) -> None:
    for process in processes:
        process.join(60)
        assert process.exitcode == 0


def test_one_process_builds_and_the_others_wait(workshop: Workshop) -> None:
    workshop.hold.touch()
    processes = [workshop.start(k) for k in range(4)]
    until(lambda: workshop.compiled() == 1)
    time.sleep(0.3)  # the others would have begun by now
    workshop.hold.unlink()
    finish(processes)
    assert workshop.compiled() == 1
    (library,) = set(workshop.outcomes())
    assert Path(library).is_file() and workshop.left_behind() == []
    assert _build.ensure("cpu").library == Path(library) and workshop.compiled() == 1


def test_a_killed_builder_leaves_no_lock_and_no_half_build(workshop: Workshop) -> None:
    workshop.hold.touch()
    builder = workshop.start(0)
    until(lambda: workshop.compiled() == 1)
    waiting = workshop.start(1)
    time.sleep(0.3)
    assert builder.pid is not None
    os.kill(builder.pid, signal.SIGKILL)
    builder.join(10)
    until(lambda: workshop.compiled() == 2)  # the one that waited has taken over
    workshop.hold.unlink()
    finish([waiting])
    (library,) = workshop.outcomes()
    assert Path(library).is_file() and workshop.left_behind() == []


def test_a_failed_build_is_told_to_those_who_waited_and_tried_again_later(workshop: Workshop) -> None:
    workshop.source.write_text(BROKEN)
    workshop.hold.touch()
    processes = [workshop.start(0)]
    until(lambda: workshop.compiled() == 1)
    processes += [workshop.start(k) for k in (1, 2)]
    time.sleep(0.5)
    workshop.hold.unlink()
    finish(processes)
    assert workshop.compiled() == 1
    (told,) = set(workshop.outcomes())
    assert "tiny_cpu.cpp:2:" in told and "nowhere" in told and "\n" not in told
    assert workshop.left_behind() == []
    with pytest.raises(UnavailableError):
        _build.ensure("cpu")
    assert workshop.compiled() == 2  # whoever comes later may have mended it
    workshop.source.write_text(SOURCE)
    assert _build.ensure("cpu").library.is_file()


def test_changed_sources_and_flags_are_other_builds(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    first = _build.ensure("cpu")
    header = workshop.source.with_suffix(".h")
    header.write_text("// a header counts, whether or not it is included\n")
    second = _build.ensure("cpu")
    monkeypatch.setenv("CXX", f"'{workshop.compiler}' -g0")
    third = _build.ensure("cpu")
    monkeypatch.setattr("torch.__version__", "2.12.0")
    fourth = _build.ensure("cpu")
    assert len({b.key for b in (first, second, third, fourth)}) == 4 and workshop.compiled() == 4
    assert all(b.library.is_file() for b in (first, second, third, fourth))


@pytest.mark.parametrize("harm", ["truncated library", "no library", "no record", "empty record", "other record"])
def test_a_damaged_build_is_made_anew(workshop: Workshop, harm: str) -> None:
    library = _build.ensure("cpu").library
    record = library.with_name(_build.RECORD)
    if harm == "truncated library":
        library.write_bytes(library.read_bytes()[:1000])
    elif harm == "no library":
        library.unlink()
    elif harm == "no record":
        record.unlink()
    else:
        record.write_text("" if harm == "empty record" else json.dumps({"sha256": "0"}))
    again = _build.ensure("cpu")
    assert workshop.compiled() == 2 and again.library.stat().st_size > 1000


def test_a_cache_that_cannot_be_written(workshop: Workshop, monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    """No superuser can write below /proc either. The temporary folder serves, and is found again."""
    monkeypatch.setenv("SIVAE_KERNEL_CACHE", "/proc/kernels")
    built = _build.ensure("cpu")
    assert built.library.is_relative_to(workshop.folder) and built.library.parents[1].stat().st_mode & 0o077 == 0
    assert [r.message for r in caplog.records if "cannot be written" in r.message].__len__() == 1
    assert _build.ensure("cpu") == built and workshop.compiled() == 1


def test_a_user_without_a_home(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    monkeypatch.delenv("SIVAE_KERNEL_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert _build.ensure("cpu").library.is_relative_to(workshop.folder)


def test_a_temporary_folder_that_others_can_write_is_not_used(workshop: Workshop) -> None:
    folder = workshop.folder / f"sivae_dist-kernels-{os.getuid()}"
    folder.mkdir()
    folder.chmod(0o777)
    found = _build._private(create=True)
    assert found is not None and found != folder and found.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize(
    ("compiler", "told"), [("nowhere-c++", r"no C\+\+ compiler \(nowhere-c\+\+"), ("false", "does not start")]
)
def test_no_compiler(workshop: Workshop, monkeypatch: pytest.MonkeyPatch, compiler: str, told: str) -> None:
    monkeypatch.setenv("CXX", compiler)
    with pytest.raises(UnavailableError, match=told) as caught:
        _build.ensure("cpu")
    assert "CXX" in caught.value.fix


def test_no_ninja(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", str(workshop.folder / "python"))
    monkeypatch.setenv("PATH", str(workshop.folder))
    monkeypatch.setenv("CXX", shutil.which("c++", path=os.defpath) or "/usr/bin/c++")
    with pytest.raises(UnavailableError, match="ninja is not found"):
        _build.ensure("cpu")


def test_no_room(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(made: _toolchain.Recipe) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(_build, "ninja_file", full)
    with pytest.raises(UnavailableError, match="No space left") as caught:
        _build.ensure("cpu")
    assert "SIVAE_KERNEL_CACHE" in caught.value.fix and workshop.left_behind() == []
