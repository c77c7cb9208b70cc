"""The optimizer of the published style networks: Adam without first moment."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer


class LreqAdam(Optimizer):
    """v <- beta2 v + (1 - beta2) g^2;  p <- p - lr sqrt(1 - beta2^t) g / (sqrt(v) + eps), t counted a parameter.

    torch's Adam with beta1 = 0 differs in eps, which it adds to the bias-corrected root. Parameters without gradient
    are left alone and their t stands still. State: `step` (on the host, as torch's own keeps it) and `exp_avg_sq`.
    """

    moments = ("exp_avg_sq",)  # state tensors of a parameter's shape; checkpoints ask for them

    def __init__(self, params: Any, *, lr: float, beta2: float = 0.99, eps: float = 1e-8) -> None:
        super().__init__(params, {"lr": lr, "beta2": beta2, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update. closure: recomputes the loss, which is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            beta2, used = group["beta2"], [p for p in group["params"] if p.grad is not None]
            if not used:
                continue
            for parameter in used:
                if not self.state[parameter]:
                    self.state[parameter] = {"step": torch.tensor(0.0), "exp_avg_sq": torch.zeros_like(parameter)}
                self.state[parameter]["step"] += 1
            gradients = [p.grad for p in used]
            squares = [self.state[p]["exp_avg_sq"] for p in used]
            torch._foreach_mul_(squares, beta2)
            torch._foreach_addcmul_(squares, gradients, gradients, 1 - beta2)
            roots = torch._foreach_sqrt(squares)
            torch._foreach_add_(roots, group["eps"])
            steps = [-group["lr"] * math.sqrt(1 - beta2 ** float(self.state[p]["step"])) for p in used]
            torch._foreach_addcdiv_(used, gradients, roots, steps)
        return loss
