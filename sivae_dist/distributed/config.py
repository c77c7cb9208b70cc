"""The section `distributed` of a run's configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sivae_dist.errors import UserError


@dataclass(frozen=True)
class DistributedConfig:
    """Ranks and how they share the work."""

    strategy: Literal["auto", "ddp", "fsdp2", "deepspeed"] = "auto"
    """ddp: every rank holds both players whole, gradients are summed. fsdp2: weights, gradients and optimizer state in
    shards, one a rank. deepspeed: ZeRO, the optimizer's state in shards. auto: what the accelerate config asks for
    (ddp where it asks for nothing)."""
    overlap: bool = False
    """ddp: gradients are summed while the backward pass goes on, not after it: the same results, more memory."""
    bucket_mib: float = 16.0
    """ddp: gradients are summed in buckets of so many MiB."""
    shard_ranks: int | None = None
    """fsdp2: ranks that hold one copy of everything together, such as those of one machine; None: all."""
    unit_parameters: int = 100_000
    """fsdp2: parts of a network with at least so many parameters are gathered one by one."""
    keep_whole: bool = False
    """fsdp2: what was gathered for the forward pass stays for the backward pass: more memory, fewer collectives."""
    zero_stage: int = 1
    """deepspeed: 1, or 2: summed gradients are in shards, too."""
    zero_offload: bool = False
    """deepspeed: the optimizer's state lies on the host, which also steps: slower, for weights that do not fit."""
    ranks: int | None = None
    """Number of ranks this run must have; another number is an error. None accepts any."""
    check: Literal["off", "start", "checkpoints"] = "checkpoints"
    """Compare code, settings, libraries, data and weights of all ranks before the first step (start), and their weights
    at each checkpoint, too (checkpoints)."""
    timeout_s: float = 600.0
    """A collective that takes longer than this ends the run with an error instead of hanging, in every process group.
    More than data.timeout_s, so that a rank whose data do not come can tell it."""

    def __post_init__(self) -> None:
        if self.ranks is not None and self.ranks < 1:
            raise UserError(
                f"distributed.ranks is {self.ranks}, must be at least 1", "set it to the number of processes"
            )
        if (self.shard_ranks is not None and self.shard_ranks < 2) or self.unit_parameters < 0:
            raise UserError(
                f"distributed: shard_ranks {self.shard_ranks}, unit_parameters {self.unit_parameters} are not in range",
                "shard_ranks must be at least 2 (or left out), unit_parameters at least 0; strategy ddp shards nothing",
            )
        if self.bucket_mib <= 0:
            raise UserError(f"distributed.bucket_mib is {self.bucket_mib}, must be positive", "for example 16")
        if self.zero_stage not in (1, 2):
            raise UserError(
                f"distributed.zero_stage is {self.zero_stage}, must be 1 or 2",
                "to cut weights into shards, which is ZeRO's stage 3, use distributed.strategy fsdp2",
            )
        if self.timeout_s <= 0:
            raise UserError(f"distributed.timeout_s is {self.timeout_s}, must be positive", "for example 600")
