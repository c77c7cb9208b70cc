"""Bytes of tensors that are alive, and the most there ever were: of real tensors, or of fake ones without memory."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Storages(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within this context every storage that an operation makes is counted, once, until its last user is gone.

    Views count nothing, what autograd saves for the backward pass counts for as long as it keeps it, and a tensor that
    is freed in the middle of a backward pass is gone from there on. Not seen: what an operation allocates for itself
    and frees before it returns (workspaces of convolutions), and the slack of a memory allocator.

    now, peak: bytes.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._alive: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def take_peak(self) -> int:
        """The most since the last call."""
        peak, self.peak = self.peak, self.now
        return peak

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Runs the operation and looks at what it returns."""
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self._see(value.untyped_storage())
        return result

    def _see(self, storage: torch.UntypedStorage) -> None:
        # A storage keeps its Python object, and so its id, for as long as anything uses it.
        name, size = id(storage), storage.nbytes()
        if name in self._alive or size == 0:
            return

        def gone(_: object) -> None:
            del self._alive[name]
            self.now -= size

        self._alive[name] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages behind these tensors, each counted once."""
    return sum({id(s): s.nbytes() for s in (t.untyped_storage() for t in tensors)}.values())
