"""Data workers: answers in order whatever the sizes, nobody waits for ever, nothing is left over."""

from __future__ import annotations

import itertools
import os
import signal
import struct
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from processes import children, gone
from test_procs import channel_of_worker

from sivae_dist.data import workers
from sivae_dist.data.workers import InThread, LateError, LostError, Team

pytestmark = pytest.mark.dist


def doubled(number):
    """In a worker: all kinds of answers."""

    def work(request: bytes):
        value = struct.unpack_from("<q", request)[0]
        if value % 5 == 3:
            return {"twice": 2 * value, "small": np.arange(value), "worker": number}
        if value % 5 == 4:
            return [np.full((value, 1 << 15), value), None, np.full(1 << 15, value, dtype=np.uint8)]
        return struct.pack("<q", 2 * value) + bytes(value)

    return work


def requests(count, size=0):
    return (struct.pack("<q", number) + bytes(size) for number in range(count))


def team(start, given, *, count=2, ahead=2, timeout_s=20.0):
    return Team(start, count, given, ahead=ahead, timeout_s=timeout_s)


@pytest.mark.parametrize(("count", "ahead", "number"), [(1, 1, 12), (3, 4, 60), (4, 2, 5)])
def test_answers_come_in_the_order_of_the_requests(count, ahead, number):
    answers = team(doubled, requests(number), count=count, ahead=ahead)
    for value, found in enumerate(answers):
        if value % 5 == 3:
            assert (found["twice"], found["worker"], len(found["small"])) == (2 * value, value % count, value)
        elif value % 5 == 4:
            whole, none, last = found
            assert whole.shape == (value, 1 << 15)
            assert (whole == value).all() and (last == value).all()
            assert none is None
            last += 1  # writable memory of its own
        else:
            assert found == struct.pack("<q", 2 * value) + bytes(value)
    assert value == number - 1
    answers.close()


def test_neither_large_requests_nor_large_answers_block_anybody(monkeypatch):
    """More than a pipe holds, both ways, before the first answer is taken: a parent that waited would never go on."""
    monkeypatch.setattr(workers, "_LOOK_S", 1000)  # nor does anything wait for that

    def start(number):
        return lambda request: np.frombuffer(request, dtype=np.uint8) + 1

    given = [os.urandom(1_000_000 + number) for number in range(20)]
    answers = team(start, given, ahead=8)
    time.sleep(0.2)
    for request, answer in zip(given, answers, strict=True):
        np.testing.assert_array_equal(answer, np.frombuffer(request, dtype=np.uint8) + 1)
    answers.close()


MOMENTS = {
    "while it works": lambda channel: None,
    "in a header": lambda channel: os.write(channel.fileno(), b"\0\0"),
    "in an answer": lambda channel: os.write(channel.fileno(), struct.pack("<qq", 100_000, -1) + bytes(50)),
    "in an array": lambda channel: os.write(channel.fileno(), struct.pack("<qqq", 5, 1, 100_000) + bytes(50)),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_worker_killed_at_any_moment_is_told(moment):
    def start(number):
        def work(request):
            if request == b"fatal":
                MOMENTS[moment](channel_of_worker())
                os.kill(os.getpid(), signal.SIGKILL)
            return request

        return work

    answers = team(start, itertools.chain([b"good"] * 3, [b"fatal"], itertools.repeat(b"good")))
    with pytest.raises(LostError, match=r"process \d+ by SIGKILL"):
        list(itertools.islice(answers, 9))
    answers.close()
    assert gone(children())


def test_a_worker_killed_while_another_process_holds_its_channel_open_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "_LOOK_S", 0.1)

    def start(number):
        def work(request):
            if request == b"1":
                if not (pid := os.fork()):
                    time.sleep(30)
                    os._exit(0)
                (tmp_path / "heir").write_text(str(pid))
                os.kill(os.getpid(), signal.SIGKILL)
            return request

        return work

    answers = team(start, [b"0", b"1", b"2"])
    with pytest.raises(LostError, match="SIGKILL"):
        list(answers)
    heir = int((tmp_path / "heir").read_text())
    assert not gone({heir}, 0.1), "the channel had not ended"
    os.kill(heir, signal.SIGKILL)
    answers.close()


def test_the_death_of_any_worker_is_told_by_the_next_answer():
    """Not when it would be that worker's turn, though there are answers of all of them."""
    answers = team(doubled, requests(10_000), count=3, ahead=5)
    next(answers)
    time.sleep(0.3)
    answers.workers[2].process.kill()
    answers.workers[2].process.join()
    with pytest.raises(LostError, match="SIGKILL"):
        next(answers)
    answers.close()


@pytest.mark.parametrize("begun", [False, True])
def test_what_does_not_come_is_late(begun):
    """Nothing at all, or the first half of a message."""

    def start(number):
        def work(request):
            if begun:
                MOMENTS["in an answer"](channel_of_worker())
            time.sleep(60)

        return work

    answers, before = team(start, [b""] * 4, timeout_s=0.4), time.monotonic()
    with pytest.raises(LateError):
        next(answers)
    assert time.monotonic() - before < 10
    answers.close()
    assert gone(children())


def test_an_error_of_a_worker_is_raised_when_its_answer_is_due():
    def start(number):
        return lambda request: 1 // request[0]

    answers = team(start, [b"\1", b"\1", b"\1", b"\0", b"\1"])
    assert [next(answers) for _ in range(3)] == [1, 1, 1]
    with pytest.raises(ZeroDivisionError) as error:
        next(answers)
    assert "in start" in error.value.__notes__[0] or "in <lambda>" in error.value.__notes__[0]
    assert list(answers) == []
    assert gone(children())


def test_what_cannot_be_pickled_is_said():
    answers = team(lambda number: lambda request: lambda: request, [b""])
    with pytest.raises(RuntimeError, match="cannot be handed over"):
        next(answers)


ITS_OWN = """
import multiprocessing, os, struct, time
from pathlib import Path
from sivae_dist.data.workers import Team

def held():
    \"\"\"Of this process: what its descriptors lead to, but for those of the listing itself.\"\"\"
    found = []
    for name in os.listdir("/proc/self/fd"):
        try:
            found.append(os.readlink(f"/proc/self/fd/{name}"))
        except FileNotFoundError:
            pass
    return sorted(found)

def children():
    me = os.getpid()
    return Path(f"/proc/{me}/task/{me}/children").read_text().split()

def sockets(request):
    return sum(link.startswith("socket:") for link in held())

def answer(request):
    return request[:8] + bytes(struct.unpack_from("<q", request)[0])

def team(work, requests):
    return Team(lambda number: work, 3, requests, ahead=2, timeout_s=60)
"""


def in_a_process_of_its_own(program: str) -> str:
    """What it prints. Here, what other tests have left may close or end at any time."""
    ran = subprocess.run(
        [sys.executable, "-c", ITS_OWN + program], check=False, capture_output=True, text=True, timeout=100
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def test_workers_hold_no_ends_of_others():
    """One socket each: its own end. Those forked last would have five ends of the others."""
    program = """
assert sockets(b"") == 0
first, second = (team(sockets, [b""] * 3) for _ in range(2))
print(*first, *second, sockets(b""))
"""
    assert in_a_process_of_its_own(program).split() == ["1"] * 6 + ["6"]


def test_nothing_is_left_over_by_those_that_are_closed_or_dropped():
    program = """
def requests(count, size=0):
    return (struct.pack("<q", number) + bytes(size) for number in range(count))

team(answer, requests(9)).close()
before = held(), children()
for number in range(6):
    answers = team(answer, requests(10_000, 50_000))
    assert (held(), children()) != before
    for _ in range(number):
        next(answers)
    answers.close()
    answers.close()
    assert list(answers) == []
    assert (held(), children()) == before, "no zombies either"

answers = team(answer, requests(10_000, 50_000))
del answers
assert sockets(b"") == 0
until = time.monotonic() + 60
while multiprocessing.active_children():
    assert time.monotonic() < until, "they notice that nobody listens"
assert (held(), children()) == before
print("nothing")
"""
    assert in_a_process_of_its_own(program) == "nothing\n"


def test_workers_that_do_not_listen_are_killed(monkeypatch):
    monkeypatch.setattr(workers, "_END_S", 0.3)
    answers = team(doubled, requests(100))
    next(answers)
    for worker in answers.workers:
        os.kill(worker.process.pid, signal.SIGSTOP)
    answers.close()
    assert not children()


def test_workers_in_the_middle_of_work_end_at_once(monkeypatch):
    monkeypatch.setattr(workers, "_END_S", 20)
    monkeypatch.setattr("multiprocessing.context.ForkProcess.kill", lambda _: pytest.fail("it did not end by itself"))
    answers = team(lambda number: lambda request: time.sleep(60), [b""] * 4)
    time.sleep(0.1)
    before = time.monotonic()
    answers.close()
    assert time.monotonic() - before < 10
    assert not children()


LEAVER = """
import os, signal, sys, time
from sivae_dist.data.workers import Team
def start(number):
    return lambda request: request or time.sleep(60)
teams = [Team(start, 2, [b"1", b"1", b"", b""], ahead=2, timeout_s=60) for _ in range(2)]
for team in teams:
    print(next(team), next(team), *(worker.process.pid for worker in team.workers), flush=True)
    for worker in team.workers:
        os.kill(worker.process.pid, signal.SIGTERM)
if sys.argv[1] == "waits":
    time.sleep(60)
sys.exit(3)
"""


@pytest.mark.parametrize("way", ["leaves", pytest.param("waits", marks=pytest.mark.slow)])
def test_workers_end_with_a_parent_that_does_not_close(way):
    """Busy ones of two teams, that a scheduler has asked to end; the second team was forked beside the first."""
    process = subprocess.Popen([sys.executable, "-c", LEAVER, way], stdout=subprocess.PIPE, text=True)
    pids = {int(pid) for _ in range(2) for pid in process.stdout.readline().split()[2:]}
    assert len(pids) == 4
    if way == "waits":
        assert not gone(pids, 0.3), "SIGTERM alone ends nobody"
        process.kill()
    assert process.wait(20) == (3 if way == "leaves" else -signal.SIGKILL)
    process.stdout.close()
    assert gone(pids, 3)


class TestInThread:
    """Page-locked copies are made in a thread; any function does here."""

    def test_order_and_the_end(self):
        threads = set()

        def prepare(answer):
            threads.add(threading.current_thread())
            return answer[:1] * 2

        ready = InThread(team(lambda number: bytes, (bytes([n]) for n in range(50))), prepare)
        assert list(ready) == [bytes([n, n]) for n in range(50)]
        assert list(ready) == []
        assert len(threads) == 1 and threading.current_thread() not in threads
        ready.close()
        assert not threads.pop().is_alive()
        assert not children()

    def test_it_is_some_ahead_and_no_more(self):
        made = []
        ready = InThread(team(lambda number: bytes, [b""] * 50), made.append, depth=3)
        next(ready)
        until = time.monotonic() + 60
        while len(made) < 4:
            assert time.monotonic() < until
            time.sleep(0.01)
        time.sleep(0.5)
        assert len(made) <= 5
        ready.close()

    def test_it_enters_first(self):
        entered = threading.local()
        ready = InThread(
            team(lambda number: bytes, [b""] * 3),
            lambda answer: entered.device,
            enter=lambda: setattr(entered, "device", 7),
        )
        assert list(ready) == [7, 7, 7]
        ready.close()

    @pytest.mark.parametrize("where", ["worker", "thread", "enter"])
    def test_errors_are_raised_in_their_turn(self, where):
        def start(number):
            return lambda request: 1 // (request[0] if where == "worker" else 1)

        seen = itertools.count()
        ready = InThread(
            team(start, [b"\1", b"\1", b"\0", b"\1"]),
            lambda answer: 1 // (next(seen) - 2) if where == "thread" else answer,
            enter=lambda: 1 // 0 if where == "enter" else None,
        )
        for _ in range(0 if where == "enter" else 2):
            next(ready)
        with pytest.raises(ZeroDivisionError):
            next(ready)
        assert list(ready) == []
        ready.close()
        assert not children()

    def test_late_and_lost(self):
        ready = InThread(team(lambda number: lambda request: time.sleep(60), [b""] * 4, timeout_s=0.3), bytes)
        with pytest.raises(LateError):
            next(ready)
        ready.close()
        answers = team(lambda number: lambda request: time.sleep(60), [b""] * 4)
        ready = InThread(answers, bytes)
        answers.workers[1].process.kill()
        with pytest.raises(LostError, match="SIGKILL"):
            next(ready)
        ready.close()
        assert not children()

    @pytest.mark.parametrize("full", [False, True])
    def test_close_while_it_waits(self, full):
        """For an answer, or for somebody to take what is ready."""
        start = (lambda number: bytes) if full else (lambda number: lambda request: time.sleep(60))
        ready = InThread(team(start, [b""] * 50), bytes)
        time.sleep(0.3)
        before = time.monotonic()
        ready.close()
        assert time.monotonic() - before < 10
        assert list(ready) == []
        assert not children()
