"""`bench data` compares ways to get the same pictures."""

from __future__ import annotations

import hashlib
import itertools
import json
import multiprocessing
import socket
import struct
import time
from typing import Any

import pytest
import torch

from sivae_dist.apps.bench import data as bench
from sivae_dist.apps.bench.served import serving
from sivae_dist.cli import main
from sivae_dist.data.store import open_store
from sivae_dist.errors import UserError


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> bench.Pictures:
    root = tmp_path_factory.mktemp("bench")
    return bench.laid_out(bench.draw(root / "shards", 32, 24, 2.0), root / "files")


def epoch(contender: bench.Contender, batch: int, count: int) -> list[str]:
    """Hashes of the pictures of the first `count` batches."""
    batches = list(itertools.islice(contender.batches(), count))
    contender.close()
    pixels = torch.cat([bench._pixels(b).contiguous() for b in batches])
    assert pixels.shape == (batch * count, 3, 32, 32)
    assert pixels.dtype == torch.uint8
    return sorted(hashlib.sha256(p.numpy().tobytes()).hexdigest() for p in pixels)


def test_all_deliver_the_same_pictures(pictures: bench.Pictures) -> None:
    """An epoch of each holds the same pixels, every picture once."""
    expected = epoch(bench.ours(pictures, 0, 8, "pillow"), 8, 3)
    assert len(set(expected)) == 24
    assert epoch(bench.folder(pictures, 0, 8), 8, 3) == expected
    assert epoch(bench.stock_webdataset(pictures, 0, 8), 8, 3) == expected
    assert [len(p) for p in pictures.encoded] == [f.stat().st_size for f in sorted(pictures.folder.iterdir())]


@pytest.mark.dist
@pytest.mark.parametrize("workers", [0, 1])
def test_every_way_is_timed(pictures: bench.Pictures, workers: int) -> None:
    rows = bench.run(pictures, workers, batch=4, seconds=0.02, turns=1)
    names = {row.name.split(",")[0] for row in rows}
    assert names == {bench.BARE, "sivae-dist", "webdataset", "folder of files"}
    assert all(row.images_per_s > 0 and row.cpu_ms > 0 and row.of_bare > 0 for row in rows)
    assert rows[0].of_bare == rows[0].wall_of_bare == 1


@pytest.mark.dist
def test_the_time_of_processes_that_have_ended_counts() -> None:
    def work() -> None:
        end = time.process_time() + 0.2
        while time.process_time() < end:
            pass

    before = bench._cpu()
    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join()
    assert bench._cpu() - before >= 0.18  # the kernel counts in steps of 10 ms


@pytest.mark.dist
def test_shards_are_served_by_another_process(pictures: bench.Pictures, capsys: pytest.CaptureFixture[str]) -> None:
    """Over HTTP come the same pictures, with an empty cache, a full one and none; an empty one is counted whole."""
    with serving(pictures.url) as address:
        caches: list[str] = []
        expected = epoch(bench.ours(pictures, 0, 8, "pillow"), 8, 3)
        for way in ("cold", "warm", "none"):
            contender = bench._served(pictures, address, 0, 8, "auto", caches, way)
            assert contender.first == (24 if way == "cold" else 0)
            assert epoch(contender, 8, 3) == expected
        assert len(caches) == 1
        with pytest.raises(UserError, match="missing"):
            open_store(address).whole("..%2fmanifest.json", 100)
    common = ["--url", pictures.url, "--workers", "0", "--batch", "4", "--seconds", "0.01", "--turns", "1"]
    main(["bench", "data", *common, "--served", "--json"])
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert all(rows[f"http, {cache} cache"]["cpu_ms"] > 0 for cache in ("empty", "full", "no"))
    with pytest.raises(UserError, match="--served serves a folder of this machine"), serving("https://elsewhere/data"):
        pass


@pytest.mark.dist
def test_readers_that_hang_up_leave_no_traceback(pictures: bench.Pictures, capfd: pytest.CaptureFixture[str]) -> None:
    """A reader that is ended resets its connections, between requests also; the server answers the next one."""
    with serving(pictures.url) as address:
        host, port = address.removeprefix("http://").split(":")
        for asked in (b"", b"GET /manifest.json HTTP/1.1\r\n\r\n"):
            with socket.create_connection((host, int(port)), timeout=10) as connection:
                connection.sendall(asked)
                if asked:
                    assert connection.recv(12) == b"HTTP/1.1 200"
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # reset, not closed
        assert open_store(address).whole("manifest.json", 1 << 20)
    assert capfd.readouterr().err == ""


def test_too_few_pictures_are_refused(pictures: bench.Pictures) -> None:
    with pytest.raises(UserError, match="24 pictures for batches of 16"):
        bench.run(pictures, 0, batch=16, seconds=0.01, turns=1)


def test_the_command(pictures: bench.Pictures, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["--url", pictures.url, "--workers", "0", "--batch", "4", "--seconds", "0.01", "--turns", "1"]
    main(["bench", "data", *common, "--json"])
    rows: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    assert {row["resolution"] for row in rows} == {32}
    main(["bench", "data", *common])
    out = capsys.readouterr().out
    assert "24 pictures of" in out
    assert "webdataset" in out


def test_grain_makes_larger_files(tmp_path: Any) -> None:
    plain, grainy = (
        bench.laid_out(bench.draw(tmp_path / f"s{grain}", 64, 8, grain), tmp_path / f"f{grain}") for grain in (0, 4)
    )
    assert grainy.kilobytes > 1.2 * plain.kilobytes
