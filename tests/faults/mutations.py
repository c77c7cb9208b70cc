"""Hypothesis strategies: valid bytes, texts and JSON values with something wrong in them."""

from __future__ import annotations

import copy
import json
from typing import Any

from hypothesis import strategies as st

DEEP = "[" * 3000
NASTY: list[Any] = [
    *(None, True, False, 0, -1, 1, 2**31, 2**53, 2**63, -(2**63), 10**40, 10**400),
    *(0.5, -0.0, 1e308, float("inf"), float("nan")),
    *("", "x", "x" * 100_000, "../../etc/passwd", "/dev/zero", "\0", "\ud800", "\x1b[2J", "None", "1e-8", "9" * 5000),
    *([], {}, [[]], [1, 2, 3], {"a": {"b": {"c": []}}}, [None] * 50, {"": ""}, {"name": "residual"}),
]


@st.composite
def changed_bytes(draw: st.DrawFn, valid: bytes) -> bytes:
    """Flips, cuts, repetitions and insertions."""
    data = bytearray(valid)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        kind = draw(st.integers(0, 5))
        if kind == 0 and data:
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == 1:
            del data[at:]
        elif kind == 2:
            data[at:at] = draw(st.binary(min_size=1, max_size=40))
        elif kind == 3:
            del data[at : at + draw(st.integers(1, 64))]
        elif kind == 4:
            data[at:at] = data[at : at + 200]
        elif data:
            data[at : at + 8] = draw(st.sampled_from([b"\xff" * 8, bytes(8), b"\x7f" + b"\xff" * 7, b"9" * 8]))
    return bytes(data)


@st.composite
def changed_json(draw: st.DrawFn, valid: Any) -> Any:
    """A JSON value in which some parts are replaced, removed or doubled."""
    value = copy.deepcopy(valid)
    for _ in range(draw(st.integers(1, 3))):
        parent: Any = value
        while True:
            keys: list[Any] = list(parent) if isinstance(parent, dict) else list(range(len(parent)))
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            if isinstance(parent[key], dict | list) and parent[key] and draw(st.integers(0, 3)):
                parent = parent[key]
                continue
            kind = draw(st.integers(0, 9))
            if kind == 0:
                del parent[key]
            elif kind == 1 and isinstance(parent, list):
                parent.append(copy.deepcopy(parent[key]))
            elif kind == 1:
                parent[draw(st.sampled_from(["", "x", "name", "extra" * 50]))] = parent[key]
            elif kind == 2 and isinstance(parent[key], int):
                parent[key] += draw(st.integers(-600, 600))
            else:
                parent[key] = copy.deepcopy(draw(st.sampled_from(NASTY)))
            break
    return value


def text_of(value: Any) -> bytes:
    """JSON as a stranger may write it: huge numbers and NaN included, whole numbers beyond Python's printing too."""
    import sys

    before = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(0)
    try:
        return json.dumps(value).encode()
    finally:
        sys.set_int_max_str_digits(before)
