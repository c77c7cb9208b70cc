"""Models from fixtures, and recorded training runs repeated by the project's own engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from golden_files import Golden
from torch import Tensor

from sivae_dist.data import Batch
from sivae_dist.distributed.replicated import Replicated
from sivae_dist.engine.iteration import Iteration
from sivae_dist.engine.optim import OptimConfig, PlayerOptim
from sivae_dist.interop import published_keys
from sivae_dist.models import Autoencoder, ModelConfig
from sivae_dist.models.mlp import MlpConfig
from sivae_dist.models.residual import ResidualConfig
from sivae_dist.models.style import StyleConfig
from sivae_dist.objectives import Objective, Phase, Players, Terms

PLAYERS = ("encoder", "decoder")


def config_for(family: published_keys.Family, shapes: dict[str, tuple[int, ...]], **more: Any) -> ModelConfig:
    settings: dict[str, Any] = published_keys.settings(family, shapes) | more
    classes: dict[str, type[ModelConfig]] = {"twod": MlpConfig, "style": StyleConfig}
    return classes.get(family, ResidualConfig)(**settings)


@dataclass
class Net:
    """A model with a fixture's weights, seen under published names."""

    model: Autoencoder
    table: dict[str, str]  # published name -> ours
    dropped: dict[str, Tensor]  # published entries without a counterpart

    def published(self, ours: dict[str, Tensor]) -> dict[str, Tensor]:
        """Renames those of our entries that are there."""
        return {name: ours[mine] for name, mine in self.table.items() if mine in ours}

    def state(self) -> dict[str, Tensor]:
        return {**self.published(self.model.state_dict()), **self.dropped}

    def kept_state(self) -> dict[str, Tensor]:
        """Without the entries that have no counterpart."""
        return self.published(self.model.state_dict())

    def table_of(self, player: str) -> dict[str, str]:
        """Published name -> ours of one player."""
        return {name: ours for name, ours in self.table.items() if ours.startswith(f"{player}.")}

    def gradients(self) -> dict[str, Tensor]:
        found = {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}
        return {name: gradient.clone() for name, gradient in self.published(found).items()}

    def players(self, condition: Tensor | None = None) -> Players:
        return Players(
            lambda x: self.model.encode(x, condition),
            lambda z, name="", *, from_prior=False: self.model.decode(z, condition),
            self.model.prior,
        )


def load(
    family: published_keys.Family, golden: Golden, dtype: torch.dtype, *, train: bool = True, **settings: Any
) -> Net:
    """The fixture's network with its initial weights. settings: of the model, besides those that shapes imply."""
    published = golden.group("sd/", dtype)
    shapes = {name: tuple(tensor.shape) for name, tensor in published.items()}
    config = config_for(family, shapes, **settings)
    model = config.build().to(dtype)
    model.load_state_dict(published_keys.to_ours(family, published), strict=True)
    dropped = {name: published[name] for name in published if published_keys.is_dropped(family, name)}
    return Net(model.train(train), published_keys.names(family, published), dropped)


@dataclass
class Step:
    """What one iteration showed: terms and gradients (published names) by phase, and the networks' calls."""

    terms: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    gradients: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    posteriors: list[Any] = field(default_factory=list)  # of every encoder call
    decoded: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # (z, x_hat) of every decoder call

    def mean(self, phase: str, term: str) -> Tensor:
        return self.terms[phase][term].mean()


Noise = Callable[[int], dict[str, Tensor]]


def train(net: Net, objective: Objective, rates: dict[str, float], batches: Tensor, noise: Noise) -> Iterator[Step]:
    """Iterations of the engine on recorded batches (iterations, B, ...) with recorded noise by iteration and name."""
    players = {name: getattr(net.model, name) for name in PLAYERS}
    optim = OptimConfig(encoder=PlayerOptim(lr=rates["encoder"]), decoder=PlayerOptim(lr=rates["decoder"]))
    iteration = Iteration(net.model, objective, Replicated(players, optim.build(players)))
    step = Step()
    hooks = [
        net.model.encoder.register_forward_hook(lambda _, args, out: step.posteriors.append(out)),
        net.model.decoder.register_forward_hook(
            lambda _, args, out: step.decoded.append((args[0].detach().clone(), out.detach().clone()))
        ),
    ]

    def observe(phase: Phase, terms: Terms) -> None:
        step.terms[phase.name] = {**terms.named, "loss": terms.loss.detach()}
        step.gradients[phase.name] = {
            name: gradient for name, gradient in net.gradients().items() if name.split(".")[0] in phase.trains
        }

    try:
        for i, x in enumerate(batches):
            step = Step()
            position = torch.arange(len(x)) + i * len(x)
            draws = noise(i)
            iteration(
                Batch(x, position), nimg=i * len(x), global_batch=len(x), noise=draws.__getitem__, observe=observe
            )
            yield step
    finally:
        for hook in hooks:
            hook.remove()
