"""What the accelerate config asks for: `accelerate launch` tells its processes by environment variables."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

from sivae_dist.distributed.config import DistributedConfig
from sivae_dist.errors import UserError

_FLAGS = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_MEGATRON_LM")


@contextmanager
def hidden() -> Iterator[None]:
    """Within, accelerate sees plain data parallelism: its own wrappers know one model, not two players.

    (On CPUs it would not use them either: it falls back to DDP without a word.)
    """
    kept = {flag: os.environ.pop(flag) for flag in _FLAGS if flag in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)


def strategy() -> Literal["ddp", "fsdp2", "deepspeed"]:
    """The strategy that the accelerate config asks for. Raises UserError for one that there is not."""
    if _true("ACCELERATE_USE_MEGATRON_LM"):
        raise UserError("the accelerate config asks for Megatron-LM, which trains transformers", "take it out")
    if _true("ACCELERATE_USE_DEEPSPEED"):
        return "deepspeed"
    return "fsdp2" if _true("ACCELERATE_USE_FSDP") else "ddp"


def settings() -> dict[str, Any]:
    """What the accelerate config sets of the section `distributed`, the strategy among it.

    Raises UserError for settings that cannot be had.
    """
    name = strategy()
    own = {"fsdp2": _fsdp2, "deepspeed": _deepspeed}
    return {"strategy": name, **(own[name]() if name in own else {})}


def resolved(config: DistributedConfig) -> DistributedConfig:
    """The section `distributed` with `auto` resolved and the accelerate config's settings for it taken over.

    A strategy that is named wins over the accelerate config, whose settings then do not count. Raises UserError.
    """
    return replace(config, **settings()) if config.strategy == "auto" else config


def _fsdp2() -> dict[str, Any]:
    version = os.environ.get("FSDP_VERSION", "1")
    if version != "2":
        raise UserError(
            f"the accelerate config asks for FSDP with fsdp_version {version}; only version 2 is supported",
            "set fsdp_version: 2 in its section fsdp_config",
        )
    for name, instead in (
        ("FSDP_OFFLOAD_PARAMS", "set it to false: it is not supported (the strategy deepspeed has zero_offload)"),
        ("FSDP_ACTIVATION_CHECKPOINTING", "set it to false, and train.recompute_from in the run's configuration"),
    ):
        if _true(name):
            raise UserError(f"the accelerate config sets {name.lower()}", instead)
    kept = os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() in {"false", "0"}
    return {"keep_whole": True} if kept else {}


def _deepspeed() -> dict[str, Any]:
    found: dict[str, str] = {}
    for name, variable, fine, instead in (
        ("deepspeed_config_file", "DEEPSPEED_CONFIG_FILE", ("none",), "name zero_stage, offload_optimizer_device"),
        ("gradient_clipping", "GRADIENT_CLIPPING", ("none", "auto", "0", "0.0"), "take it out, set optim.clip_norm"),
        (
            "gradient_accumulation_steps", "GRADIENT_ACCUMULATION_STEPS", ("none", "auto", "1"),
            "take it out, and set train.accumulation",
        ),
        (
            "zero_stage", "DEEPSPEED_ZERO_STAGE", ("none", "1", "2"),
            "set it to 1 or 2; to cut weights into shards, which is stage 3, use launch/accelerate/fsdp2.yaml",
        ),
        ("offload_optimizer_device", "DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", ("none", "cpu"), "set it to none or cpu"),
        ("offload_param_device", "DEEPSPEED_OFFLOAD_PARAM_DEVICE", ("none",), "set it to none: weights stay"),
    ):  # fmt: skip
        value = os.environ.get(f"ACCELERATE_{variable}", "none")
        if value.lower() not in fine:
            raise UserError(f"the accelerate config sets {name} to {value} for DeepSpeed", instead)
        found[name] = value.lower()
    stage = {} if found["zero_stage"] == "none" else {"zero_stage": int(found["zero_stage"])}
    return stage | ({"zero_offload": True} if found["offload_optimizer_device"] == "cpu" else {})


def _true(name: str) -> bool:
    return os.environ.get(name, "").lower() in {"1", "true", "yes"}
