"""Worker processes of the packer and of `data verify`: whatever kills them, and whenever, is told; nobody waits on."""

from __future__ import annotations

import os
import signal
import struct
import sys
import time
from pathlib import Path

import pytest
from processes import children, gone

from sivae_dist.data import procs
from sivae_dist.data.procs import run_tasks
from sivae_dist.errors import UserError

pytestmark = pytest.mark.dist


def outcome(function, count=6, workers=2, progress=lambda n: None):
    return list(run_tasks(function, range(count), workers, progress))


def test_results_progress_and_large_answers():
    ticks = []

    def work(number, tick):
        for _ in range(10):
            tick()
        return number, os.getpid(), bytes(1 << 20)

    found = outcome(work, 9, 3, ticks.append)
    assert sorted(number for number, *_ in found) == list(range(9))
    assert os.getpid() not in {pid for _, pid, _ in found}
    assert all(len(data) == 1 << 20 for *_, data in found)
    assert 0 < sum(ticks) <= 90
    assert gone({pid for _, pid, _ in found})
    assert outcome(work, 2, 1, ticks.append)[0][1] == os.getpid()


def test_errors_come_back():
    def refuse(number, tick):
        raise UserError(f"number {number} is bad", "take another")

    with pytest.raises(UserError, match="is bad") as told:
        outcome(refuse)
    assert told.value.fix == "take another"

    def fail(number, tick):
        return 1 // 0

    with pytest.raises(ZeroDivisionError) as error:
        outcome(fail)
    assert "in fail" in error.value.__notes__[0]

    def unspeakable(number, tick):
        return lambda: number

    with pytest.raises(RuntimeError, match="cannot be handed over"):
        outcome(unspeakable)
    assert gone(children())


def channel_of_worker():
    """That of the worker process that this runs in."""
    frame = sys._getframe()
    while "channel" not in frame.f_locals:
        frame = frame.f_back
    return frame.f_locals["channel"]


MOMENTS = {
    "while it works": lambda channel: None,
    "in a header": lambda channel: os.write(channel.fileno(), b"\0\0"),
    "in an answer": lambda channel: os.write(channel.fileno(), struct.pack("<qq", 100_000, 0) + bytes(50)),
    "in an array": lambda channel: os.write(channel.fileno(), struct.pack("<qqq", 5, 1, 100_000) + bytes(50)),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_worker_killed_at_any_moment_is_told(moment):
    def work(number, tick):
        if number == 1:
            MOMENTS[moment](channel_of_worker())
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.05)
        return number

    with pytest.raises(UserError, match="a worker process was killed"):
        outcome(work)
    assert gone(children())


def test_a_worker_killed_while_another_holds_its_channel_open_is_told(tmp_path):
    def work(number, tick):
        if number == 1:
            if not (pid := os.fork()):
                time.sleep(30)
                os._exit(0)
            (tmp_path / "heir").write_text(str(pid))
            os.kill(os.getpid(), signal.SIGKILL)
        return number

    with pytest.raises(UserError, match="a worker process was killed"):
        outcome(work)
    heir = int((tmp_path / "heir").read_text())
    assert not gone({heir}, 0.1), "the channel had not ended"
    os.kill(heir, signal.SIGKILL)


@pytest.mark.parametrize("deaf", [False, True])
def test_others_end_when_one_fails(tmp_path, monkeypatch, deaf):
    """At their next tick, and if there is none for long, without being asked."""
    monkeypatch.setattr(procs, "_END_S", 0.3 if deaf else 20)

    def work(number, tick):
        if number == 0:
            while not (tmp_path / "1").exists():
                time.sleep(0.01)
            raise UserError("the first is bad", "")
        Path(tmp_path / str(number)).touch()
        try:
            while True:
                time.sleep(0.02)
                if not deaf:
                    tick()
        finally:
            (tmp_path / "cleaned").touch()

    with pytest.raises(UserError, match="the first is bad"):
        outcome(work)
    assert gone(children())
    assert (tmp_path / "cleaned").exists() != deaf


def test_one_who_takes_no_more_ends_them(monkeypatch):
    """Also those who hand over more than a pipe holds; nobody has to be killed for it."""
    monkeypatch.setattr(procs, "_END_S", 5)
    monkeypatch.setattr("multiprocessing.context.ForkProcess.kill", lambda _: pytest.fail("it did not end by itself"))
    tasks = run_tasks(lambda number, tick: bytes(1 << 20), range(50), 3, lambda n: None)
    next(tasks)
    tasks.close()
    assert gone(children())
