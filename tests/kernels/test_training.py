"""Every architecture trains the same by the CPU kernels as by plain PyTorch: losses, gradients, weights, statistics."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from sivae_dist import counters
from sivae_dist.data import Batch
from sivae_dist.distributed.replicated import Replicated
from sivae_dist.engine.iteration import Iteration
from sivae_dist.engine.optim import OptimConfig, PlayerOptim
from sivae_dist.models import Autoencoder, ModelConfig
from sivae_dist.objectives.soft_introvae import SoftIntroVaeConfig
from sivae_dist.ops import kernels
from sivae_dist.registry import components

MODELS: dict[str, Any] = {
    name: cls.tiny()  # type: ignore[attr-defined]
    for name, cls in components("sivae_dist.models", ModelConfig).items()
    if name in ("residual", "style", "modulated")
}
MODELS["residual, group norm, introvae"] = replace(MODELS["residual"], norm="group", block="introvae")
ITERATIONS = 3
# Single precision against itself in another order, three iterations deep.
TOLERANCE = 2e-4


def trained(config: Any, mode: Any, dtype: torch.dtype) -> dict[str, Tensor]:
    """Terms, gradients of the last iteration, weights and buffers."""
    torch.manual_seed(0)
    model: Autoencoder = config.build()
    with torch.no_grad():  # so that noise, biases and norms that begin at 0 or 1 matter
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model = model.to(dtype)
    players = {"encoder": model.encoder, "decoder": model.decoder}
    settings = PlayerOptim(lr=1e-4, beta1=0.9, beta2=0.999)
    objective = SoftIntroVaeConfig(beta_neg=4.0, decoder_z="reencode", draws="fresh")
    step = Iteration(
        model,
        objective.build(model.sample_shape),
        Replicated(players, OptimConfig(settings, settings).build(players)),
    )
    seen: dict[str, Tensor] = {}

    def observe(phase: Any, terms: Any) -> None:
        for name, value in terms.named.items():
            seen[f"{phase.name} {name} {len(seen)}"] = value.detach().clone()
        for player in phase.trains:
            for name, parameter in players[player].named_parameters():
                if parameter.grad is not None:
                    seen[f"gradient {player} {name}"] = parameter.grad.clone()

    with kernels.using(mode):
        for number in range(ITERATIONS):
            position = torch.arange(4 * number, 4 * number + 4)
            x = counters.normal(counters.key(3, "x"), position, model.sample_shape, dtype).sigmoid()
            report = step(Batch(x, position), nimg=4 * number, global_batch=4, observe=observe)
            assert report.skip is None
    return seen | {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("name", MODELS)
def test_kernels_train_as_plain_pytorch(name: str) -> None:
    """All numbers in double precision, to rounding; in single precision the terms of the losses.

    Adam makes steps of the learning rate out of gradients that are nothing but rounding, as that of a bias that the
    norm after it takes out: single weights differ.
    """
    fused, plain = (trained(MODELS[name], mode, torch.float64) for mode in ("cpu", "reference"))
    assert fused.keys() == plain.keys()
    for key, value in plain.items():
        size = max(1.0, float(value.abs().max()))
        torch.testing.assert_close(fused[key], value, rtol=1e-6, atol=1e-8 * size, msg=key)
    fused, plain = (trained(MODELS[name], mode, torch.float32) for mode in ("cpu", "reference"))
    terms = [key for key, value in plain.items() if key[-1].isdigit() and value.shape == (4,)]
    assert len(terms) > 20
    for key in terms:
        torch.testing.assert_close(fused[key], plain[key], rtol=TOLERANCE, atol=TOLERANCE, msg=key)
