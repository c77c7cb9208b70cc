"""Bars that neither killed nor forked processes stop."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading

from sivae_dist.progress import Bar

FORK = multiprocessing.get_context("fork")


def draw() -> None:
    with open(os.devnull, "w") as file, Bar(total=3, file=file) as bar:
        bar.update(3)


def die_drawing() -> None:
    with Bar.get_lock():
        os.kill(os.getpid(), signal.SIGKILL)


def ends(target) -> int | None:
    process = FORK.Process(target=target)
    process.start()
    process.join(60)
    process.kill()
    process.join()
    return process.exitcode


def test_a_process_killed_while_it_draws_stops_no_other() -> None:
    draw()
    assert ends(die_drawing) == -signal.SIGKILL
    thread = threading.Thread(target=draw, daemon=True)
    thread.start()
    thread.join(60)
    assert not thread.is_alive()
    assert ends(draw) == 0


def test_a_process_forked_while_another_thread_draws_can_draw() -> None:
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with Bar.get_lock():
            held.set()
            done.wait(100)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(60)
    try:
        assert ends(draw) == 0
    finally:
        done.set()
        thread.join()
