"""Named tensors as files that every rank writes a part of, and that any number of ranks reads again, shared otherwise.

torch.distributed.checkpoint plans who writes and reads what: of a DTensor each rank its shard, of a tensor that all
ranks hold one of them. Its usual metadata file is a pickle, which could execute code when it is read, so its storage
of safetensors files is used: each part tells in its header, as JSON, where its pieces belong in the whole.

Scalars are stored as tensors of one element, under a name that says so: not all of torch's reader knows scalars.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sivae_dist.distributed.group import Group
from sivae_dist.distributed.sharding import distributed
from sivae_dist.errors import UserError

_SCALAR = ":scalar"
NAME = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")


def background_group(group: Group) -> Any:
    """A process group of its own, on the host, for planning in a thread while training goes on. Collective."""
    return dist.new_group(timeout=group.timeout, backend="gloo") if group.ranks > 1 else None


class Staging:
    """Copies tensors to host memory, that is kept from one time to the next. The last copies are overwritten then."""

    def __init__(self) -> None:
        import torch.distributed.checkpoint.hf_storage  # noqa: F401, PLC0415 (takes half a second: not in the first use)
        from torch.distributed.checkpoint import staging, state_dict_saver  # noqa: F401, PLC0415

        self._stager: Any = None

    def __call__(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies in the same distribution."""
        from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions  # noqa: PLC0415 (loads slowly)

        if self._stager is None:
            pinned = any(tensor.is_cuda for tensor in tensors.values())
            self._stager = DefaultStager(StagingOptions(pinned, False, False, False))
        copies: dict[str, Tensor] = self._stager.stage(
            {name: t.detach() if distributed(t) else t.detach().contiguous() for name, t in tensors.items()}
        )
        return copies


def _storable(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """By the names they are stored under; scalars as views of one element."""
    scalars = {name for name, tensor in tensors.items() if tensor.dim() == 0 and not distributed(tensor)}
    return {n + _SCALAR if n in scalars else n: t.view(1) if n in scalars else t for n, t in tensors.items()}


def write(folder: Path, tensors: Mapping[str, Tensor], group: Group, background: Any = None) -> None:
    """Writes parts into a folder, synced to the disk. Returns once all ranks have written theirs. Collective.

    background: of `background_group`; where it is given, this may run in a thread. Raises OSError.
    """
    from torch.distributed.checkpoint.api import CheckpointException  # noqa: PLC0415 (loads slowly)
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter  # noqa: PLC0415
    from torch.distributed.checkpoint.state_dict_saver import save  # noqa: PLC0415

    _quiet()
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    try:
        alone = group.ranks == 1
        save(_storable(tensors), storage_writer=writer, process_group=background, no_dist=alone)
    except CheckpointException as error:
        rank, (cause, _) = next(iter(error.failures.items()))
        raise OSError(getattr(cause, "errno", None), f"rank {rank}: {cause}", str(folder)) from error


def contents(folder: Path) -> dict[str, torch.Size]:
    """Name -> size of everything in a folder of parts, whole safetensors files included."""
    return {name.removesuffix(_SCALAR): _size(name, known) for name, known in _metadata(_reader(folder)).items()}


def read(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Fills tensors in place: whole ones, or DTensors, of which each rank reads what it holds.

    Raises UserError where the parts lack something, or have it in another size.
    """
    from torch.distributed.checkpoint.api import CheckpointException  # noqa: PLC0415 (loads slowly)
    from torch.distributed.checkpoint.state_dict_loader import load  # noqa: PLC0415

    _quiet()
    reader = _reader(folder)
    known, wanted = _metadata(reader), _storable(tensors)
    for name, tensor in wanted.items():
        if name not in known or known[name].size != tensor.shape:
            there = f"is {tuple(known[name].size)} there" if name in known else "is not there"
            raise UserError(f"the parts in {folder} do not fit: {name} {there}, expected {tuple(tensor.shape)}", _FIX)
        covered = sum(chunk.sizes.numel() for chunk in known[name].chunks)
        if covered != tensor.numel():
            raise UserError(f"the parts in {folder} have {covered} of {tensor.numel()} elements of {name}", _FIX)
    try:
        load(wanted, storage_reader=reader, no_dist=True)  # each rank knows what it wants: nothing is sent
    except CheckpointException as error:
        cause = next(iter(error.failures.values()))[0]
        raise UserError(f"cannot read the parts in {folder}: {cause!r}"[:500], _FIX) from error


def read_whole(folder: Path, prefix: str = "") -> dict[str, Tensor]:
    """All tensors whose names begin so, whole, by the rest of their names."""
    tensors = {
        name.removesuffix(_SCALAR): torch.empty(_size(name, known), dtype=known.properties.dtype)
        for name, known in _metadata(_reader(folder)).items()
        if name.startswith(prefix)
    }
    read(folder, tensors)
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


_FIX = "resume from another checkpoint of the run (--resume PATH), or start anew (--resume never)"


def _quiet() -> None:
    """That nothing is sent between ranks is meant."""
    warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


def _size(name: str, known: Any) -> torch.Size:
    return torch.Size([]) if name.endswith(_SCALAR) else known.size


def _reader(folder: Path) -> Any:
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader  # noqa: PLC0415 (loads slowly)

    return HuggingFaceStorageReader(str(folder))


def _metadata(reader: Any) -> dict[str, Any]:
    """What the headers of the files say. Raises UserError where they say nothing sensible."""
    try:
        known: dict[str, Any] = reader.read_metadata().state_dict_metadata
    except Exception as error:  # headers that are no headers raise whatever they meet
        raise UserError(f"cannot read the parts in {reader.path}: {error!r}"[:500], _FIX) from error
    return known
