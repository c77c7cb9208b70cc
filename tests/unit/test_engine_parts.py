"""EMA, schedules, meters, checkpoint files, metrics files: each against a plain calculation."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from sivae_dist import counters
from sivae_dist.data import Batch, HostBatch
from sivae_dist.distributed.group import Group
from sivae_dist.engine import checkpoint
from sivae_dist.engine.checkpoint_writer import CheckpointConfig, CheckpointWriter
from sivae_dist.engine.ema import Ema, EmaConfig
from sivae_dist.engine.iteration import IterationReport, by_place
from sivae_dist.engine.meters import Meters
from sivae_dist.engine.optim import OptimConfig, PlayerOptim
from sivae_dist.engine.schedule import TrainConfig, due
from sivae_dist.engine.tracking import cut_back, read_metrics
from sivae_dist.errors import UserError
from sivae_dist.models.residual import ResidualConfig


def model_and_optimizers(seed: int = 0):
    torch.manual_seed(seed)
    model = ResidualConfig.tiny().build()
    optimizers = OptimConfig().build({"encoder": model.encoder, "decoder": model.decoder})
    for optimizer in optimizers.values():
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    return model, optimizers


def test_counters_agree_with_themselves() -> None:
    key = counters.key(7, "noise", "z_prior")
    numbers = torch.tensor([3, 1 << 40, 9])
    draws = counters.normal(key, numbers, (5,), torch.float64)
    assert torch.equal(draws[1], counters.normal(key, numbers[1:2], (5,), torch.float64)[0])
    many = counters.normal(key, torch.arange(4000), (16,), torch.float64)
    assert abs(float(many.mean())) < 0.02
    assert abs(float(many.var()) - 1) < 0.02
    assert abs(float((many**4).mean()) - 3) < 0.1
    assert abs(float(torch.corrcoef(many.T)[0, 8])) < 0.06  # the two halves of one Box-Muller pair
    assert counters.key(7, "noise", "z_prior") != counters.key(7, "noise", "z_post")
    assert sorted(counters.permutation(key, 1000)) == list(range(1000))
    assert counters.mix(1) == 0x5692161D100B05E5  # pinned: resumed runs rely on it


def test_ema_follows_its_definition() -> None:
    config = EmaConfig(half_life_kimg=0.1, rampup=0.0)
    model, _ = model_and_optimizers()
    ema = Ema(config, model)
    before = {k: v.clone() for k, v in ema.model.state_dict().items()}
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.add_(1)
    ema.update(model, nimg=500, batch=50)
    beta = 0.5 ** (50 / 100)
    for name, now in ema.model.state_dict().items():
        if now.is_floating_point():
            expected = beta * before[name] + (1 - beta) * model.state_dict()[name]
            assert torch.allclose(now, expected, atol=1e-6), name
        else:
            assert torch.equal(now, model.state_dict()[name])
    assert EmaConfig(half_life_kimg=10, rampup=0.05).beta(1000, 10) == pytest.approx(0.5 ** (10 / 50))
    assert EmaConfig(half_life_kimg=0).beta(1000, 10) == 0


def test_due_fires_once_for_each_multiple() -> None:
    fired = [nimg for nimg in range(7, 7 * 300, 7) if due(nimg, 7, 0.1)]
    assert len(fired) == (7 * 299) // 100
    assert all(nimg % 100 < 7 for nimg in fired)
    assert not any(due(nimg, 7, 0) for nimg in range(7, 700, 7))
    assert TrainConfig(kimg=1, batch=32).total_nimg == 1024


def test_learning_rate_schedule() -> None:
    config = OptimConfig(PlayerOptim(lr=1.0), PlayerOptim(lr=2.0), warmup_kimg=1, milestones_kimg=(5, 8), decay=0.1)
    assert [round(config.factor(n), 6) for n in (0, 500, 1000, 4999, 5000, 8000)] == [0, 0.5, 1, 1, 0.1, 0.01]
    _, optimizers = model_and_optimizers()
    assert config.apply(optimizers, 5000) == {"encoder": 0.1, "decoder": pytest.approx(0.2)}
    assert optimizers["decoder"].param_groups[0]["lr"] == pytest.approx(0.2)


def test_micro_batches_hold_what_lies_in_their_part_of_the_global_batch() -> None:
    """Three parts of [40, 48): 40 41 42, 43 44 45, 46 47, whatever the order and whichever of them a rank owns."""
    mine = torch.tensor([47, 41, 40, 46])
    parts = by_place(Batch(mine.double()[:, None], mine, mine % 3), 3, 40, 8)
    assert [part.position.tolist() for part in parts] == [[41, 40], [], [47, 46]]
    for part in parts:
        assert torch.equal(part.x[:, 0].long(), part.position)
        assert torch.equal(part.label, part.position % 3)
    with pytest.raises(ValueError, match="expected 40 to 46"):
        by_place(Batch(mine[:, None], mine), 3, 40, 7)


def test_micro_batches_are_cut_without_a_look_at_the_device() -> None:
    """Where the loader tells positions on the host. (Values of a meta tensor cannot be read.)"""
    mine = torch.tensor([41, 46])
    on_device = mine.to("meta")
    parts = by_place(Batch(torch.empty(2, 3, device="meta"), on_device, place=mine), 2, 40, 8)
    assert [part.x.shape for part in parts] == [(1, 3), (1, 3)]
    host = HostBatch(torch.zeros(2, 3, 4, 4, dtype=torch.uint8), mine)
    for size in (None, 2):
        assert host.on(torch.device("cpu")).to(torch.device("cpu"), None, size=size).place is mine


def test_meters_give_means_over_images() -> None:
    meters = Meters(Group(), torch.device("cpu"))
    for kl in (10.0, 30.0):
        sums = {("encoder", "kl_real"): torch.tensor(kl), ("encoder", "kl_fake"): torch.tensor(3 * kl)}
        meters.add(IterationReport(sums, {"encoder": torch.tensor(2.0)}), 4)
    state = json.loads(json.dumps(meters.state()))
    again = Meters(Group(), torch.device("cpu"))
    again.load(state)
    expected = {"kl/real": 5.0, "kl/fake": 15.0, "kl/gap": 10.0, "grad_norm/encoder": 2.0}
    assert meters.means() == expected == again.means()
    assert meters.means() == {}


def test_checkpoint_restores_bit_for_bit(tmp_path: Path) -> None:
    model, optimizers = model_and_optimizers(0)
    ema = Ema(EmaConfig(), model)
    state = {"plan_salt": 3, "sums": {}, "data": ""}
    path = checkpoint.write(tmp_path, checkpoint.snapshot(64, model, ema.model, optimizers, state))
    other, other_optimizers = model_and_optimizers(1)
    other_ema = Ema(EmaConfig(), other)
    saved = checkpoint.read(path)
    checkpoint.restore(saved, other, other_ema.model, other_optimizers)
    assert saved.nimg == 64
    assert saved.state["plan_salt"] == 3
    for a, b in ((model, other), (ema.model, other_ema.model)):
        for name, tensor in a.state_dict().items():
            assert torch.equal(tensor, b.state_dict()[name]), name
    for player in optimizers:
        before, after = optimizers[player].state_dict()["state"], other_optimizers[player].state_dict()["state"]
        assert before.keys() == after.keys()
        for index in before:
            for key, value in before[index].items():
                assert torch.equal(value, after[index][key])


def test_only_whole_checkpoints_count(tmp_path: Path) -> None:
    model, optimizers = model_and_optimizers()
    ema = Ema(EmaConfig(), model)
    good = checkpoint.write(tmp_path, checkpoint.snapshot(10, model, ema.model, optimizers, {}))
    (tmp_path / ".nimg-000000020.tmp").mkdir()
    half = tmp_path / "nimg-000000030"
    half.mkdir()
    assert checkpoint.complete(tmp_path) == [good]
    (tmp_path / "latest").write_text("../../etc\n")
    assert checkpoint.latest(tmp_path) == good
    weights = good / "weights.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(UserError, match="differs from what was written"):
        checkpoint.read(good)


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"../../x": {}}', '{"weights.safetensors": {"bytes": 1}}', "null", "{}"]
)
def test_damaged_listing_is_told(tmp_path: Path, content: str) -> None:
    model, optimizers = model_and_optimizers()
    path = checkpoint.write(tmp_path, checkpoint.snapshot(1, model, Ema(EmaConfig(), model).model, optimizers, {}))
    (path / "files.json").write_text(content)
    with pytest.raises(UserError):
        checkpoint.read(path)


def test_another_architecture_is_told(tmp_path: Path) -> None:
    model, optimizers = model_and_optimizers()
    saved = checkpoint.snapshot(1, model, Ema(EmaConfig(), model).model, optimizers, {})
    other = ResidualConfig(image_size=12, channels=(4, 6), zdim=7).build()
    with pytest.raises(UserError, match=r"another architecture.*head.weight: \(10, 54\) there, \(14, 54\) here"):
        checkpoint.load_weights(other, saved.tensors["weights"], "the checkpoint")


@pytest.mark.parametrize("background", [True, False])
def test_retention(tmp_path: Path, background: bool) -> None:
    model, optimizers = model_and_optimizers()
    ema = Ema(EmaConfig(), model)
    config = CheckpointConfig(keep_last=2, keep_every_kimg=0.1, best="eval/psnr", background=background)
    writer = CheckpointWriter(config, tmp_path)
    for nimg in range(20, 420, 20):
        metrics = {"eval/psnr": 30.0 if nimg == 60 else 20.0}
        writer.save(checkpoint.snapshot(nimg, model, ema.model, optimizers, {"metrics": metrics}))
    writer.close()
    assert [checkpoint.nimg_of(p) for p in checkpoint.complete(tmp_path)] == [60, 100, 200, 300, 380, 400]
    assert checkpoint.latest(tmp_path).name == "nimg-000000400"


def test_a_failed_write_is_raised_and_loses_nothing(tmp_path: Path) -> None:
    model, optimizers = model_and_optimizers()
    ema = Ema(EmaConfig(), model)
    writer = CheckpointWriter(CheckpointConfig(), tmp_path)
    writer.save(checkpoint.snapshot(10, model, ema.model, optimizers, {}))
    writer.wait()
    (tmp_path / ".nimg-000000020.tmp").write_text("in the way")  # a file where the folder must be made
    writer.save(checkpoint.snapshot(20, model, ema.model, optimizers, {}))
    with pytest.raises(UserError, match="cannot write the checkpoint of 20 images"):
        writer.close()
    assert checkpoint.latest(tmp_path).name == "nimg-000000010"


def test_metrics_are_cut_back(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"nimg": 10, "a": 1.5}\n{"nimg": 20, "a": 2}\n{"nimg": 30, "a": 3}\n{"nimg": 40, "a')
    cut_back(path, 20)
    assert read_metrics(path) == [{"nimg": 10, "a": 1.5}, {"nimg": 20, "a": 2}]
