"""Checkpoints that every rank writes a part of: `checkpoint.format: sharded`.

    checkpoints/nimg-000012345/   shard-0000N-....safetensors   weights/NAME and optimizer/PLAYER/PARAMETER/STATE:
                                                                of each what rank N - 1 holds, or its share of copies
                                  ema.safetensors               averaged weights, whole, as in the other format
                                  state.json, files.json        as in the other format

Training waits until its tensors are copied to the host; all else happens in a thread of each rank, which meet in a
process group of their own. The parts are written aside; once all ranks have theirs on the disk, rank 0 puts the
averaged weights together, lists sizes and checksums, and renames. Parts tell where they belong in the whole, so any
number of ranks can read them, under any strategy, each what it needs.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from sivae_dist.distributed import parts
from sivae_dist.distributed.group import Group
from sivae_dist.distributed.sharding import distributed
from sivae_dist.distributed.strategy import Strategy
from sivae_dist.engine import checkpoint
from sivae_dist.engine.checkpoint import Snapshot
from sivae_dist.engine.checkpoint_writer import CheckpointConfig, CheckpointWriter
from sivae_dist.errors import UserError

_AVERAGE = "average"  # folder of its parts, until they are put together


def writer_for(config: CheckpointConfig, folder: Path, group: Group) -> CheckpointWriter:
    """The writer of the configured format. Collective."""
    return (ShardedWriter if config.format == "sharded" else CheckpointWriter)(config, folder, group)


class ShardedWriter(CheckpointWriter):
    """Writes parts on all ranks."""

    def __init__(self, config: CheckpointConfig, folder: Path, group: Group | None = None) -> None:
        super().__init__(config, folder, group)
        self._staging = parts.Staging()
        self._background = parts.background_group(self.group)

    def take(self, nimg: int, model: nn.Module, ema: nn.Module, strategy: Strategy, state: dict[str, Any]) -> None:
        """Copies what this rank holds to the host and begins writing it. Collective."""
        self.wait()  # what is being written lies where the new copies go
        final = self.folder / checkpoint.name_of(nimg)
        aside = self.folder / f".{final.name}.tmp"
        if self.group.is_main:
            shutil.rmtree(aside, ignore_errors=True)  # of a life that was killed
        self.group.barrier()
        tensors = {f"weights/{name}": tensor for name, tensor in model.state_dict().items()}
        for player in strategy.players:
            for name, states in strategy.optimizer_state(player).items():
                tensors |= {f"optimizer/{player}/{name}/{key}": value for key, value in states.items()}
        average = {f"{_AVERAGE}/{name}": tensor for name, tensor in ema.state_dict().items()}
        staged = self._staging(tensors | average)
        kept = {name: staged[name] for name in tensors}
        averaged = {name.removeprefix(f"{_AVERAGE}/"): staged[name] for name in average}
        self.begin(nimg, lambda: self._write_parts(aside, final, kept, averaged, {"nimg": nimg, **state}))

    def _write_parts(
        self, aside: Path, final: Path, tensors: dict[str, Tensor], average: dict[str, Tensor], state: dict[str, Any]
    ) -> None:
        parts.write(aside / _AVERAGE, average, self.group, self._background)
        parts.write(aside, tensors, self.group, self._background)
        if self.group.is_main:
            try:
                save_file(parts.read_whole(aside / _AVERAGE), aside / "ema.safetensors")
                shutil.rmtree(aside / _AVERAGE)
                checkpoint.write_lists(aside, {"format": checkpoint.FORMAT, **state})
            except BaseException:
                shutil.rmtree(aside, ignore_errors=True)  # a part of a checkpoint only fills the disk further
                raise
            checkpoint.publish(aside, final)


def restore(saved: Snapshot, model: nn.Module, ema: nn.Module, strategy: Strategy) -> None:
    """Fills live objects from the parts of a snapshot, of shards only what this rank holds.

    Raises UserError when they belong to another architecture.
    """
    folder = saved.path
    assert folder is not None
    sizes = parts.contents(folder)
    weights = {f"weights/{name}": tensor for name, tensor in model.state_dict().items()}
    _check(weights, {name: size for name, size in sizes.items() if name.startswith("weights/")})
    own_average = ema.state_dict()
    _check(own_average, {n: s for n, s in sizes.items() if not n.startswith(("weights/", "optimizer/"))})
    with torch.no_grad():
        parts.read(folder, weights)
        # A whole file: its scalars are stored as such.
        parts.read(folder, {name: tensor for name, tensor in own_average.items() if tensor.dim()})
        with safe_open(folder / "ema.safetensors", framework="pt") as file:
            for name, tensor in own_average.items():
                if not tensor.dim():
                    tensor.copy_(file.get_tensor(name))
    strategy.weights_changed()
    stored: dict[str, dict[str, dict[str, Tensor]]] = {}
    for player in strategy.players:
        states = stored[player] = _empty_states(strategy, player, sizes)
        names = {f"optimizer/{player}/{n}/{key}": t for n, state in states.items() for key, t in state.items()}
        parts.read(folder, names)
    checkpoint.load_optimizers(strategy, stored)


def _empty_states(strategy: Strategy, player: str, sizes: dict[str, torch.Size]) -> dict[str, dict[str, Tensor]]:
    """Room for the stored state of each parameter that has one, shared over ranks as the parameter is."""
    found: dict[str, dict[str, Tensor]] = {}
    parameters = strategy.parameters(player)
    for full_name, size in sizes.items():
        if not full_name.startswith(f"optimizer/{player}/"):
            continue
        name, _, key = full_name.removeprefix(f"optimizer/{player}/").rpartition("/")
        like = parameters.get(name)
        if like is not None and distributed(like) and like.shape == size:
            found.setdefault(name, {})[key] = torch.empty_like(like, requires_grad=False)
        else:
            found.setdefault(name, {})[key] = torch.empty(size)
    return found


def _check(own: dict[str, Tensor], there: dict[str, torch.Size]) -> None:
    wrong = [name for name in {**own, **there} if name not in own or there.get(name) != own[name].shape]
    if wrong:
        raise UserError(
            f"the checkpoint is of another architecture ({len(wrong)} tensors do not fit, first {wrong[0]})",
            "resume with the config stored in the run, or start a new run with another --out",
        )
