"""Every format that can be imported: read, exported as safetensors, loaded, trained on. A new one needs a file here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from published_files import in_another_process, save, state_dict
from safetensors.torch import load_file

import sivae_dist
from sivae_dist import counters
from sivae_dist.apps.import_published import import_published
from sivae_dist.data import Batch
from sivae_dist.distributed.replicated import Replicated
from sivae_dist.engine.iteration import Iteration
from sivae_dist.interop.published import ABSENT, FORMATS, Format, read
from sivae_dist.models import Autoencoder, ModelConfig
from sivae_dist.registry import components


def bootstrap(path: Path) -> Path:
    state = state_dict("residual_3")
    target = {
        key.replace("decoder.", "target_decoder.", 1): v for key, v in state.items() if key.startswith("decoder.")
    }
    return save({"epoch": 3, "model": {**state, **target}}, path)


FILES: dict[Format, Callable[[Path], Path]] = {
    "soft-introvae-residual": lambda path: save({"epoch": 1, "model": state_dict("residual_1")}, path),
    "soft-introvae-bootstrap": bootstrap,
    "soft-introvae-2d": lambda path: save({"epoch": 0, "model": state_dict("twod_1")}, path),
    "soft-introvae-style": lambda path: in_another_process(
        "torch.save(style_content(state_dict('style_1')), sys.argv[1])", path
    ),
    "introvae": lambda path: in_another_process(
        "torch.save({'epoch': 7, 'model': introvae_module(state_dict('introvae_1'))}, sys.argv[1])", path
    ),
}


def batch_for(model: Autoencoder) -> Batch:
    position = torch.arange(3)
    low, high = model.input_range or (-1.0, 1.0)
    drawn = counters.normal(counters.key(1, "x"), position, model.sample_shape, torch.float32).sigmoid()
    return Batch(low + (high - low) * drawn, position, position % max(1, model.condition_dim))


@pytest.mark.parametrize("format", [name for name in FORMATS if name not in ABSENT])
def test_imported_exported_and_trained_on(format: Format, tmp_path: Path) -> None:
    path = FILES[format](tmp_path / "theirs.pth")
    done = import_published(path, tmp_path / "run", format=format)
    found = read(path, format)
    assert type(found.model) in components("sivae_dist.models", ModelConfig).values()

    # What was written is what was read, and safetensors alone rebuilds the network.
    for stem, tensors in (("weights", found.weights), ("ema", found.average or found.weights)):
        exported = load_file(done.checkpoint / f"{stem}.safetensors")
        assert exported.keys() == tensors.keys()
        assert all(torch.equal(exported[name], tensor) for name, tensor in tensors.items())
    own = found.model.build()
    own.load_state_dict(load_file(done.checkpoint / "ema.safetensors"), strict=True)
    own.eval().requires_grad_(False)
    loaded = sivae_dist.load(tmp_path / "run")
    batch = batch_for(own)
    condition = torch.eye(own.condition_dim)[batch.label] if own.condition_dim else None
    expected, q = own.encode(batch.x, condition), loaded.encode(batch.x, condition)
    assert torch.equal(q.mu, expected.mu) and torch.equal(q.logvar, expected.logvar)
    assert q.mu.isfinite().all() and q.mu.std() > 0
    assert torch.equal(loaded.model.decode(q.mu, condition), own.decode(q.mu, condition))

    # It trains from there with the settings it was given.
    model, config = loaded.model.requires_grad_(True), loaded.config
    players = {"encoder": model.encoder, "decoder": model.decoder}
    strategy = Replicated(players, config.optim.build(players))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    report = Iteration(model, config.objective.build(model.sample_shape), strategy)(batch, nimg=0, global_batch=3)
    assert report.skip is None
    moved = {name.partition(".")[0] for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"encoder", "decoder"}
