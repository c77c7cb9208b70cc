"""The checksum of pictures is zlib's CRC-32, whichever library computes it."""

from __future__ import annotations

import sys
import zlib
from types import SimpleNamespace

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from sivae_dist.data import checksum


@given(st.binary(max_size=3000))
def test_small_pieces(data: bytes) -> None:
    assert checksum.checksum(data) == zlib.crc32(data)


def test_pictures_and_views_of_them() -> None:
    noise = np.random.default_rng(0).integers(0, 256, 300_001, dtype=np.uint8).tobytes()
    for begin, end in ((0, 300_001), (1, 20_000), (7, 65_543), (123, 123)):
        assert checksum.checksum(noise[begin:end]) == zlib.crc32(noise[begin:end])
        assert checksum.checksum(memoryview(noise)[begin:end]) == zlib.crc32(noise[begin:end])


def test_the_faster_library_is_used_where_it_is_right(monkeypatch) -> None:
    def use(crc32):
        monkeypatch.setitem(sys.modules, "isal", SimpleNamespace(isal_zlib=SimpleNamespace(crc32=crc32)))
        return checksum._fastest()

    def same(data: bytes) -> int:
        return zlib.crc32(data)

    assert use(same) is same
    assert use(lambda data: zlib.crc32(data) ^ (len(data) > 1000)) is checksum.plain
    monkeypatch.setitem(sys.modules, "isal", None)
    assert checksum._fastest() is checksum.plain
