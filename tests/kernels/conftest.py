"""The kernels are built once for all tests and runs, in the checkout's build folder (or a temporary one)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from lanes import Lane

from sivae_dist.ops import kernels

CACHE = Path(__file__).resolve().parents[2] / "build" / "kernels"


@pytest.fixture(scope="session", autouse=True)
def kernel_cache() -> Iterator[Path]:
    before = {name: os.environ.get(name) for name in ("SIVAE_KERNEL_CACHE", "SIVAE_KERNELS")}
    os.environ["SIVAE_KERNEL_CACHE"] = os.environ.get("SIVAE_TEST_KERNEL_CACHE", str(CACHE))
    os.environ.pop("SIVAE_KERNELS", None)
    yield Path(os.environ["SIVAE_KERNEL_CACHE"])
    for name, value in before.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value


@pytest.fixture
def lane(request: pytest.FixtureRequest) -> Iterator[Lane]:
    """A build with its mode in force; parametrise with `lanes.LANES`, indirectly."""
    with kernels.using(request.param.mode):
        assert kernels.serves(request.param.device)
        yield request.param
