"""Tensors of which a rank may hold a shard only (DTensor), beside plain ones: their local part, and the whole."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, TypeGuard, TypeVar

import torch
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


def distributed(tensor: Tensor) -> TypeGuard[Any]:
    """Whether it is a DTensor. Tells without loading their module, which takes a second: most runs need none."""
    return type(tensor) not in (Tensor, nn.Parameter) and hasattr(tensor, "device_mesh")


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor, as a plain tensor that shares its memory."""
    return tensor.to_local() if distributed(tensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor. Collective for a DTensor; a plain tensor is returned itself."""
    return tensor.full_tensor() if distributed(tensor) else tensor


def host_copies(tensors: Mapping[str, Tensor], *, keep: bool = True) -> dict[str, Tensor]:
    """Whole copies in host memory; nothing where `keep` is false (ranks that write nothing). Collective."""
    copies = {}
    for name, tensor in tensors.items():
        full = whole(tensor.detach())
        if keep:
            copies[name] = full.to("cpu", copy=True).contiguous()
    return copies


@torch.no_grad()
def put(held: Tensor, value: Tensor) -> Tensor:
    """Overwrites `held` by `value`, a whole tensor or one distributed as `held` is; returns `held`."""
    if distributed(held) and not distributed(value):
        from torch.distributed.tensor import distribute_tensor  # noqa: PLC0415 (loaded already by whoever made `held`)

        # Every rank has the whole value and takes its part of it: nothing is sent.
        full = value.to(held.device, held.dtype)
        value = distribute_tensor(full, held.device_mesh, held.placements, src_data_rank=None)
    return held.copy_(value)


def whole_model(template: M, weights: Mapping[str, Tensor] | None = None) -> M:
    """A model like `template` (settings and all) with these weights, whole and plain, for use without collectives.

    weights: of the state dict of such a model; None: the template's own. Without them a template that is whole and
    plain is returned itself. Collective where there are DTensors.
    """
    if weights is None:
        weights = template.state_dict()
        if not any(distributed(tensor) for tensor in weights.values()):
            return template
    plain: dict[int, object] = {}
    for name, parameter in template.named_parameters():
        plain[id(parameter)] = nn.Parameter(whole(weights[name].detach()), requires_grad=False)
    for name, buffer in template.named_buffers():
        if name in weights:
            plain[id(buffer)] = whole(weights[name].detach())
    return copy.deepcopy(template, plain)
