"""Which strategy a run gets, from its configuration and the accelerate config's variables."""

from __future__ import annotations

import os

import pytest
import torch
from torch import nn

from sivae_dist.distributed import asked, strategies
from sivae_dist.distributed.config import DistributedConfig
from sivae_dist.distributed.fsdp2 import units
from sivae_dist.distributed.group import Group
from sivae_dist.distributed.replicated import Replicated
from sivae_dist.distributed.sharding import whole_model
from sivae_dist.distributed.strategy import Traffic
from sivae_dist.errors import UserError

FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
ZERO = {"ACCELERATE_USE_DEEPSPEED": "true"}


@pytest.fixture
def variables(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in list(os.environ):
        if name.startswith(("ACCELERATE_", "FSDP_")):
            monkeypatch.delenv(name)
    return monkeypatch


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({}, DistributedConfig(strategy="ddp")),
        (FSDP, DistributedConfig(strategy="fsdp2")),
        ({**FSDP, "FSDP_RESHARD_AFTER_FORWARD": "false"}, DistributedConfig(strategy="fsdp2", keep_whole=True)),
        ({**ZERO, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}, DistributedConfig(strategy="deepspeed", zero_stage=2)),
        (
            {**ZERO, "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu"},
            DistributedConfig(strategy="deepspeed", zero_offload=True),
        ),
    ],
)
def test_auto_follows_the_accelerate_config(
    variables: pytest.MonkeyPatch, env: dict[str, str], expected: DistributedConfig
) -> None:
    for name, value in env.items():
        variables.setenv(name, value)
    assert asked.resolved(DistributedConfig()) == expected
    assert asked.resolved(DistributedConfig(strategy="ddp")).strategy == "ddp"


@pytest.mark.parametrize(
    ("env", "says"),
    [
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, "fsdp_version 1"),
        ({**FSDP, "FSDP_OFFLOAD_PARAMS": "true"}, "fsdp_offload_params"),
        ({**FSDP, "FSDP_ACTIVATION_CHECKPOINTING": "true"}, "fsdp_activation_checkpointing"),
        ({**ZERO, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, "zero_stage to 3"),
        ({**ZERO, "ACCELERATE_DEEPSPEED_CONFIG_FILE": "zero.json"}, "zero.json"),
        ({**ZERO, "ACCELERATE_GRADIENT_CLIPPING": "1.0"}, "gradient_clipping to 1.0"),
        ({**ZERO, "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, "gradient_accumulation_steps to 4"),
        ({**ZERO, "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "nvme"}, "offload_optimizer_device to nvme"),
    ],
)
def test_what_cannot_be_honoured_is_refused(variables: pytest.MonkeyPatch, env: dict[str, str], says: str) -> None:
    for name, value in env.items():
        variables.setenv(name, value)
    with pytest.raises(UserError) as refused:
        asked.resolved(DistributedConfig())
    assert says in refused.value.what and refused.value.fix


@pytest.mark.parametrize("values", [{"zero_stage": 3}, {"shard_ranks": 1}, {"unit_parameters": -1}])
def test_values_out_of_range(values: dict[str, int]) -> None:
    with pytest.raises(UserError):
        DistributedConfig(**values)  # type: ignore[arg-type]


def test_accelerate_sees_plain_data_parallelism(variables: pytest.MonkeyPatch) -> None:
    variables.setenv("ACCELERATE_USE_FSDP", "true")
    with asked.hidden():
        assert "ACCELERATE_USE_FSDP" not in os.environ
    assert os.environ["ACCELERATE_USE_FSDP"] == "true"


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.small, self.large = nn.Linear(2, 2), nn.Linear(20, 20)
        self.blocks = nn.ModuleList([nn.Linear(20, 20), nn.ModuleList([nn.Linear(30, 30), nn.Linear(1, 1)])])


def test_units_are_the_large_parts() -> None:
    net = _Net()
    assert units(net, 100) == [net.large, net.blocks[0], net.blocks[1][0]]  # type: ignore[index]
    net.shard_units = lambda: [net.small]  # type: ignore[assignment,method-assign]
    assert units(net, 100) == [net.small]


@pytest.mark.parametrize("name", ["auto", "ddp", "fsdp2"])
def test_one_rank_trains_as_always(variables: pytest.MonkeyPatch, name: str) -> None:
    net = _Net()
    optimizer = torch.optim.Adam(net.parameters())
    config = DistributedConfig(strategy=name)  # type: ignore[arg-type]
    strategy = strategies.build(config, {"net": net}, {"net": optimizer}, Group())
    assert type(strategy) is Replicated
    assert whole_model(net) is net


def test_traffic_is_a_mean_an_iteration() -> None:
    traffic = Traffic()
    traffic.add(100, 3)
    traffic.add(50)
    traffic.steps = 2
    assert traffic.take() == {"dist/bytes_per_step": 75.0, "dist/collectives_per_step": 2.0}
    assert traffic.take() == {"dist/bytes_per_step": 0.0, "dist/collectives_per_step": 0.0}
