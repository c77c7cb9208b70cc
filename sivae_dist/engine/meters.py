"""Sums of terms between two reports, global over ranks when they are read, exact across a restart."""

from __future__ import annotations

import torch
from torch import Tensor

from sivae_dist.distributed.group import Group
from sivae_dist.engine.iteration import IterationReport

# (phase, term) -> TensorBoard tag. Anything else an objective reports appears as PHASE/TERM.
TAGS = {
    ("encoder", "loss"): "loss/encoder",
    ("decoder", "loss"): "loss/decoder",
    ("joint", "loss"): "loss/joint",
    ("encoder", "rec"): "rec/real",
    ("joint", "rec"): "rec/real",
    ("encoder", "kl_real"): "kl/real",
    ("joint", "kl_real"): "kl/real",
    ("encoder", "kl_rec"): "kl/rec",
    ("encoder", "kl_fake"): "kl/fake",
    ("encoder", "exp_elbo_rec"): "exp_elbo/rec",
    ("encoder", "exp_elbo_fake"): "exp_elbo/fake",
}


class Meters:
    """Running sums in float64 on the device. Nothing is read back to the host until `means`."""

    def __init__(self, group: Group, device: torch.device) -> None:
        self.group, self.device = group, device
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}  # what the sum is divided by: images for terms, iterations for norms

    def add(self, report: IterationReport, global_batch: int) -> None:
        """Takes in one iteration. A skipped phase reports nothing, so the means are those of the finite ones."""
        for (phase, term), total in report.sums.items():
            self._add(TAGS.get((phase, term), f"{phase}/{term}"), total, global_batch)
        for player, norm in report.grad_norm.items():
            # Every rank holds the same norm; each contributes its share so that the sum over ranks is the norm.
            self._add(f"grad_norm/{player}", norm / self.group.ranks, 1)
        for tag, (total, count) in report.shares.items():
            self._add(tag, total, count)

    def _add(self, tag: str, value: Tensor, count: int) -> None:
        value = value.detach().to(self.device, torch.float64)
        self.sums[tag] = self.sums[tag] + value if tag in self.sums else value
        self.counts[tag] = self.counts.get(tag, 0) + count

    def settle(self) -> None:
        """Moves all ranks' sums to rank 0 (zeros elsewhere). Collective; every rank knows the same tags."""
        if self.group.ranks == 1 or not self.sums:
            return
        tags = sorted(self.sums)
        total = self.group.sum_(torch.stack([self.sums[tag] for tag in tags]))
        share = total if self.group.is_main else torch.zeros_like(total)
        self.sums = dict(zip(tags, share.unbind(), strict=True))

    def means(self) -> dict[str, float]:
        """Means since the last call, the same on every rank; then starts anew. Collective."""
        tags = sorted(self.sums)
        if not tags:
            return {}
        total = self.group.sum_(torch.stack([self.sums[tag] for tag in tags])).tolist()
        means = {tag: value / self.counts[tag] for tag, value in zip(tags, total, strict=True)}
        self.sums.clear()
        self.counts.clear()
        if "kl/fake" in means and "kl/real" in means:
            means["kl/gap"] = means["kl/fake"] - means["kl/real"]
        return means

    def state(self) -> dict[str, tuple[float, int]]:
        """Sums and counts for a checkpoint (after `settle`, complete on rank 0)."""
        return {tag: (float(total), self.counts[tag]) for tag, total in self.sums.items()}

    def load(self, state: dict[str, tuple[float, int]]) -> None:
        """Takes up the sums of a checkpoint instead of its own: on rank 0, the others begin with zero."""
        self.sums.clear()
        self.counts.clear()
        for tag, (total, count) in state.items():
            value = total if self.group.is_main else 0.0
            self.sums[tag] = torch.tensor(value, dtype=torch.float64, device=self.device)
            self.counts[tag] = int(count)
