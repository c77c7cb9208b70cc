"""Parts of networks that may be computed a second time instead of being kept in memory (activation checkpointing).

Between the forward and the backward pass of a phase, autograd keeps what every layer computed: at 1024 pixels this is
what fills a device, not the weights. A block that is recomputed keeps its input alone and runs once more when its
gradient is due. Results are the same bit for bit, since the second run computes the same from the same input:

- what draws random numbers in a block draws them by name and position (`DecoderDraws`), so they repeat;
- buffers (running statistics, averages) move in the first run only: the second works on copies. A block may therefore
  not read a buffer that it moves itself. Batch norms keep statistics in the second run where they did in the first:
  what they save for their backward pass depends on it;
- autocast is in the second run what it was in the first;
- collectives (batch norm over ranks) take place again, on all ranks in the same order, since all have the same graph.

Which blocks do so is a setting of the run, never of the architecture or of a checkpoint.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint


class Block(nn.Module):
    """A part of a network. Subclasses write `forward`, whose first argument is the map (B, C, H, W) to work on.

    recompute_from: with maps of this many pixels a side or more the block keeps only its arguments until its backward
                    pass, and computes the rest again there; None keeps everything. See `recompute_blocks`.
    """

    recompute_from: int | None = None

    def pixels(self, x: Tensor) -> int:
        """Pixels a side of the largest map that the block makes of x; one that enlarges x says so."""
        return x.shape[-1]

    def __call__(self, x: Tensor, *rest: Any) -> Any:
        """As nn.Module's."""
        if self.recompute_from is None or not torch.is_grad_enabled() or self.pixels(x) < self.recompute_from:
            return super().__call__(x, *rest)
        return checkpoint(
            super().__call__, x, *rest, use_reentrant=False, preserve_rng_state=False, context_fn=self._runs
        )

    def _runs(self) -> tuple[AbstractContextManager[object], AbstractContextManager[object]]:
        return nullcontext(), _OnCopies(self)


class _OnCopies(AbstractContextManager[None]):
    """Within, the buffers of a block are copies, which are then forgotten. As often as the block is recomputed.

    Putting old values back instead would tell autograd of a change to what it has saved elsewhere. Made at the first
    run, whose batch norms it remembers: by the second, another phase may have told them to keep statistics, or not to.
    """

    def __init__(self, block: nn.Module) -> None:
        self.block = block
        self._own: list[tuple[nn.Module, str, Tensor]] = []
        self._tracked = [(m, m.track_running_stats) for m in block.modules() if isinstance(m, _BatchNorm)]
        self._now: list[tuple[_BatchNorm, bool]] = []

    def __enter__(self) -> None:
        modules = self.block.modules()
        self._own = [(m, name, buffer) for m in modules for name, buffer in m.named_buffers(recurse=False)]
        for module, name, buffer in self._own:
            setattr(module, name, buffer.clone())
        self._now = [(norm, norm.track_running_stats) for norm, _ in self._tracked]
        for norm, tracked in self._tracked:
            norm.track_running_stats = tracked

    def __exit__(self, *_: object) -> None:
        for module, name, buffer in self._own:
            setattr(module, name, buffer)
        for norm, tracked in self._now:
            norm.track_running_stats = tracked
        self._own, self._now = [], []


def recompute_blocks(model: nn.Module, from_pixels: int | None) -> int:
    """Sets which blocks are recomputed: those whose maps have `from_pixels` a side or more (0: all; None: none).

    The present resolution counts, so that a growing model recomputes more as it grows. Returns how many blocks there
    are; an architecture without blocks keeps everything.
    """
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    for block in blocks:
        block.recompute_from = from_pixels
    return len(blocks)
