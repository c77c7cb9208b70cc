"""How long a run is, and when something recurring is due, all in images seen."""

from __future__ import annotations

from dataclasses import dataclass

from sivae_dist.errors import UserError


@dataclass(frozen=True)
class TrainConfig:
    """Length, batch and seed of a run."""

    kimg: float = 1000.0
    """The run ends after this many thousand images (rounded up to whole batches)."""
    batch: int = 32
    """Images per iteration over all ranks together; any number of ranks gives the same training."""
    accumulation: int = 1
    """Each rank splits its part of a batch into this many micro-batches to save memory."""
    recompute_from: int | None = None
    """Blocks of the networks that work on maps of this many pixels a side or more are not kept for the backward pass
    but computed once more there: less memory, the same results, about a third more time where all do (0). None keeps
    all. `sivae-dist memory` tells what it saves."""
    decode_once: bool = False
    """Where an objective decodes the same latents in both phases (Soft-IntroVAE unless it draws afresh, IntroVAE): keep
    the images of the encoder phase with their graph for the decoder phase. Two of a decoder's forward passes an
    iteration less, the same results, more memory (`sivae-dist memory` tells how much), for every micro-batch. Strategy
    ddp only."""
    keep_freed_mb: int = 256
    """On a CPU the process keeps up to this much freed memory for the next tensors instead of giving it back to the
    system, which costs more time than much of the arithmetic on small maps. 0 leaves the C library as it is."""
    seed: int = 0
    """Keys weights, data order and all noise."""
    minutes: float = 0.0
    """Stop after this many minutes as if asked to: with a checkpoint that the same command goes on from. 0: never."""

    def __post_init__(self) -> None:
        if self.recompute_from is not None and self.recompute_from < 0:
            raise UserError(
                f"train.recompute_from is {self.recompute_from}, expected pixels a side",
                "use 0 for all blocks, 256 for those of 256 pixels and more, None for none",
            )
        if self.keep_freed_mb < 0:
            raise UserError(f"train.keep_freed_mb is {self.keep_freed_mb}, expected megabytes", "0 keeps none")
        if self.kimg <= 0 or self.batch < 1 or self.accumulation < 1 or self.minutes < 0:
            raise UserError(
                f"train: kimg {self.kimg}, batch {self.batch}, accumulation {self.accumulation}, "
                f"minutes {self.minutes} are not all in range",
                "kimg must be positive, batch and accumulation at least 1, minutes at least 0",
            )

    @property
    def total_nimg(self) -> int:
        """Images after which the run ends: the first multiple of the batch that reaches kimg."""
        wanted = round(self.kimg * 1000)
        return -(-wanted // self.batch) * self.batch


def due(nimg: int, batch: int, every_kimg: float) -> bool:
    """Whether a multiple of `every_kimg` was passed by the iteration of `batch` images that ended at `nimg`.

    Depends on positions only, so a resumed run does the same things at the same places. Never due when every_kimg <= 0.
    """
    if every_kimg <= 0:
        return False
    every = every_kimg * 1000
    return int(nimg / every) > int((nimg - batch) / every)
