"""What one phase leaves behind for reports: sums of its terms, and how often numbers ran into their bounds."""

from __future__ import annotations

import torch
from torch import Tensor

from sivae_dist.models import Posterior
from sivae_dist.models.posterior import LOGVAR_MAX, LOGVAR_MIN
from sivae_dist.objectives import Terms

# Beyond these an exp(alpha ELBO) no longer tells anything: no gradient arrives at 0, and at 1 nothing is judged.
EXP_ELBO_ZERO, EXP_ELBO_ONE = 1e-30, 1 - 1e-6
_EXP_ELBO = "exp_elbo_"  # how objectives name these terms

Shares = dict[str, tuple[Tensor, int]]


class Tally:
    """Collects over the micro-batches of a phase. Tensors stay on the device; nothing waits for them.

    sums: term -> sum over this rank's samples.
    """

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self._logvar: list[Tensor] = []
        self._exp_elbo: list[Tensor] = []

    def watch(self, posterior: Posterior) -> None:
        """Takes note of a posterior that the objective was given."""
        self._logvar.append(posterior.logvar.detach().flatten(1))

    def add(self, terms: Terms) -> None:
        """Takes in the terms of one micro-batch."""
        for name, value in {**terms.named, "loss": terms.loss.detach()}.items():
            total = value.sum()
            self.sums[name] = self.sums[name] + total if name in self.sums else total
            if name.startswith(_EXP_ELBO):
                self._exp_elbo.append(value)

    def shares(self, global_batch: int, micro_batches: int) -> Shares:
        """Tag -> (sum over this rank's samples, number of samples on all ranks that it is a fraction of).

        guard/logvar_low, guard/logvar_high: entries of a logvar that stand at its bounds, over all encodings;
        guard/exp_elbo_zero, guard/exp_elbo_one: samples whose exp(alpha ELBO) has run empty or full.
        """
        found: Shares = {}
        if self._logvar:
            logvar = torch.cat(self._logvar)
            count = len(self._logvar) // micro_batches * global_batch
            found["guard/logvar_low"] = (logvar <= LOGVAR_MIN).sum() / logvar.shape[1], count
            found["guard/logvar_high"] = (logvar >= LOGVAR_MAX).sum() / logvar.shape[1], count
        if self._exp_elbo:
            values = torch.cat(self._exp_elbo)
            count = len(self._exp_elbo) // micro_batches * global_batch
            found["guard/exp_elbo_zero"] = (values < EXP_ELBO_ZERO).sum(), count
            found["guard/exp_elbo_one"] = (values > EXP_ELBO_ONE).sum(), count
        return found


def add_shares(total: Shares, more: Shares) -> None:
    """Adds the shares of another phase, in place."""
    for tag, (value, count) in more.items():
        before, counted = total.get(tag, (0.0, 0))
        total[tag] = before + value, counted + count
