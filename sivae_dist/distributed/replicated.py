"""Strategy `ddp`: every rank holds both players whole, and each phase all-reduces the gradient of the trained one.

No DistributedDataParallel wrapper: a phase calls the trained network several times through the frozen one, which
needs either two step modules or find_unused_parameters there, and is silently wrong with static_graph. Adding up the
gradients after the backward needs no hooks and makes no assumption about the graph. The gradient is the SUM over ranks
of gradients of (local per-sample sums / global batch), so ranks may hold different numbers of samples, none included.

With `overlap` the same buckets are sent while the last backward pass of a phase goes on, each as soon as its gradients
are there: a bucket holds consecutive parameters, and the last ones come first. Which parameters have gradients is taken
from the last time that the player was trained, so the first time nothing is sent early. Buckets are sent in one order
on all ranks; what was expected and did not come (or came unexpectedly) is sent after the backward pass, as without
overlap. Sums are the same bit for bit either way.

With gloo, buckets have a process group of their own. With NCCL they share that of all else: while operations of one
communicator are under way no other may be used (torch.distributed.new_group, "Safe concurrent usage"), and batch norm
sums over ranks within the backward pass, too. One communicator does on the device what it was given in the order in
which it got it, and that is one order on ranks that run the same backward pass (as DistributedDataParallel relies on).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from sivae_dist.distributed.config import DistributedConfig
from sivae_dist.distributed.group import Group
from sivae_dist.distributed.strategy import Gradient, Strategy

BUCKET_BYTES = 16 << 20


@dataclass
class _Bucket:
    """Parameters whose gradients are sent together."""

    parameters: list[nn.Parameter]
    missing: set[int] = field(default_factory=set)  # ids of those whose gradient the backward pass still owes
    flat: Tensor | None = None  # their gradients, being summed
    work: dist.Work | None = None
    local: Tensor | None = None  # norm before the sum


class Replicated(Strategy):
    """Both players whole on every rank. overlap: gradients are sent while the backward pass goes on."""

    name = "ddp"
    keeps_graphs = True

    def __init__(
        self,
        players: dict[str, nn.Module],
        optimizers: dict[str, Optimizer],
        group: Group | None = None,
        *,
        clip_norm: float | None = None,
        overlap: bool = False,
        bucket_bytes: int = BUCKET_BYTES,
    ) -> None:
        super().__init__(players, optimizers, group, clip_norm=clip_norm)
        self.bucket_bytes = bucket_bytes
        self._expected: dict[str, list[nn.Parameter]] = {}  # player -> those with a gradient when it was last trained
        self._queue: list[_Bucket] = []  # of this phase, in the order in which all ranks send them
        self._of: dict[int, _Bucket] = {}  # id of a parameter -> its bucket in the queue
        self._early = 0  # buckets sent
        self._armed = False
        self.sent_early = 0  # buckets since the start that were sent within a backward pass
        self.overlap = overlap and self.group.ranks > 1
        self._own_group: dist.ProcessGroup | None = None  # of the buckets; None: the one of all else
        if self.overlap:
            if "nccl" not in str(dist.get_backend()):  # or "cuda:nccl,cpu:gloo"
                self._own_group = dist.new_group(timeout=self.group.timeout)
            for player in players.values():
                for parameter in player.parameters():
                    parameter.register_post_accumulate_grad_hook(self._arrived)  # type: ignore[no-untyped-call]

    def train_only(self, names: Iterable[str]) -> None:
        """See Strategy."""
        chosen = sorted(set(names))
        super().train_only(chosen)
        self._queue, self._early = [], 0
        if self.overlap:
            for name in chosen:
                self._queue += _buckets(self._expected.get(name, []), self.bucket_bytes)
        self._of = {id(parameter): bucket for bucket in self._queue for parameter in bucket.parameters}

    def backward(self, loss: Tensor, *, last: bool = True) -> None:
        """Accumulates gradients of a scalar; with overlap, begins to sum them in the last one."""
        self._armed = last and bool(self._queue)
        if self._armed:
            for bucket in self._queue:
                bucket.missing = {id(parameter) for parameter in bucket.parameters}
        try:
            loss.backward()  # type: ignore[no-untyped-call]
        finally:
            self._armed = False

    def _arrived(self, parameter: nn.Parameter) -> None:
        """A gradient is complete. Sends the buckets that are, up to the first that is not."""
        bucket = self._of.get(id(parameter)) if self._armed else None
        if bucket is None:
            return
        bucket.missing.discard(id(parameter))
        while self._early < len(self._queue) and not self._queue[self._early].missing:
            self._send(self._queue[self._early])
            self._early += 1
            self.sent_early += 1

    def _send(self, bucket: _Bucket) -> None:
        """Begins the sum of a bucket; zeros where there is no gradient."""
        with torch.no_grad():
            parts = [(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in bucket.parameters]
            bucket.flat = torch.cat(parts)
            bucket.local = torch.linalg.vector_norm(bucket.flat)
        if not self.overlap:
            self.group.sum_(bucket.flat)
        else:
            bucket.work = dist.all_reduce(bucket.flat, group=self._own_group, async_op=True)
        self.traffic.add(bucket.flat.nbytes)

    def reduce(self, name: str, *, scale: float = 1.0) -> Gradient:
        """Sums the player's gradients over ranks, divides them by `scale` (what the loss was multiplied by), clips."""
        parameters = list(self.players[name].parameters())
        parts: list[Tensor] = []
        if self.group.ranks > 1:
            # What the backward pass did not complete; before anything else is sent, as on ranks where it did.
            while self._early < len(self._queue):
                self._send(self._queue[self._early])
                self._early += 1
            self._fill(parameters)
            used = [parameter for parameter in parameters if parameter.grad is not None]
            own = {id(parameter) for parameter in parameters}
            parts += [_receive(bucket) for bucket in self._queue if id(bucket.parameters[0]) in own]
            late = [parameter for parameter in used if id(parameter) not in self._of]
            for bucket in _buckets(late, self.bucket_bytes):  # one at a time: each takes memory for its sum
                self._send(bucket)
                parts.append(_receive(bucket))
            self._expected[name] = used
        gradients = [p.grad for p in parameters if p.grad is not None]
        if scale != 1.0:
            torch._foreach_mul_(gradients, 1.0 / scale)
        norm: Tensor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
        self._clip(gradients, norm)
        return Gradient(norm, torch.linalg.vector_norm(torch.stack(parts)) if parts else norm)

    def _fill(self, parameters: list[nn.Parameter]) -> None:
        """Gives zeros to those without a gradient here but with one on another rank: all ranks add up the same tensors.

        Those that no rank has used (levels of a growing network) stay without: optimizers leave such parameters alone,
        on several ranks as on one. The answer is read from the device only where some are missing.
        """
        used = torch.tensor([float(p.grad is not None) for p in parameters], device=parameters[0].device)
        self.group.sum_(used)
        if all(parameter.grad is not None for parameter in parameters):
            return
        for parameter, ranks in zip(parameters, used.tolist(), strict=True):
            if parameter.grad is None and ranks > 0:
                parameter.grad = torch.zeros_like(parameter)


def _receive(bucket: _Bucket) -> Tensor:
    """Waits for a bucket's sum and puts it where the gradients are, if there are any. Returns its norm before."""
    assert bucket.flat is not None and bucket.local is not None
    if bucket.work is not None:
        bucket.work.wait()
    offset = 0
    for parameter in bucket.parameters:
        if parameter.grad is not None:
            parameter.grad.copy_(bucket.flat[offset : offset + parameter.numel()].view_as(parameter))
        offset += parameter.numel()
    bucket.flat = bucket.work = None
    return bucket.local


def _buckets(parameters: list[nn.Parameter], nbytes: int) -> list[_Bucket]:
    """Consecutive parameters of one dtype, up to `nbytes` each (a larger one is a bucket of its own), last ones first.

    The backward pass completes the gradients of a network's last layers first.
    """
    buckets: list[_Bucket] = []
    size = 0
    for parameter in reversed(parameters):
        if not buckets or size + parameter.nbytes > nbytes or buckets[-1].parameters[0].dtype != parameter.dtype:
            buckets.append(_Bucket([]))
            size = 0
        buckets[-1].parameters.append(parameter)
        size += parameter.nbytes
    return buckets


def build(
    config: DistributedConfig,
    players: dict[str, nn.Module],
    optimizers: dict[str, Optimizer],
    group: Group,
    *,
    clip_norm: float | None = None,
) -> Replicated:
    """The strategy as configured."""
    nbytes = int(config.bucket_mib * (1 << 20))
    return Replicated(
        players, optimizers, group, clip_norm=clip_norm, overlap=config.overlap, bucket_bytes=max(nbytes, 1)
    )
