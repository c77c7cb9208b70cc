"""sivae_dist.load: what a trained model gives depends on seed and number of a sample, and on nothing else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from saving import STYLE, save

import sivae_dist
from sivae_dist.engine.load import Noise, Trained, load
from sivae_dist.errors import UserError
from sivae_dist.models.style.styled import StyledDecoder

Runs = dict[str, Path]


@pytest.mark.parametrize("name", ["style", "modulated", "residual", "points", "growing"])
@pytest.mark.parametrize("noise", ["random", "fixed", "off"])
def test_a_sample_is_a_function_of_seed_and_number(runs: Runs, name: str, noise: Noise) -> None:
    trained = load(runs[name])
    x = trained.sample(7, seed=3, noise=noise)
    assert x.shape == (7, *trained.model.sample_shape)
    torch.testing.assert_close(load(runs[name], batch=2).sample(7, seed=3, noise=noise), x)
    torch.testing.assert_close(trained.sample(3, seed=3, noise=noise), x[:3])
    torch.testing.assert_close(trained.sample(3, seed=3, first=4, noise=noise), x[4:])
    assert not torch.allclose(trained.sample(7, seed=4, noise=noise), x)


@pytest.mark.parametrize("name", ["style", "modulated"])
def test_noise(runs: Runs, name: str) -> None:
    trained = load(runs[name])
    z = trained.z(1, 0).expand(3, -1)
    silent, fixed = trained.decode(z, noise="off"), trained.decode(z)
    drawn, other = trained.decode(z, noise="random"), trained.decode(z, noise="random", seed=1)
    for same in (silent, fixed):
        torch.testing.assert_close(same[0], same[1])
    for a, b in [(silent, fixed), (fixed, drawn), (silent, drawn), (drawn, other)]:
        assert (a - b).flatten(1).abs().amax(1).min() > 1e-3
    assert (drawn[0] - drawn[1]).abs().max() > 1e-3
    torch.testing.assert_close(trained.decode(z), fixed)  # "off" left nothing behind
    torch.testing.assert_close(trained.decode(z[1:], noise="random", first=1), drawn[1:])


def test_the_first_map_too_is_every_samples_own(runs: Runs) -> None:
    """In training a whole batch shares it; here batches are an accident."""
    trained = load(runs["growing"])
    trained.model.set_level(0)
    for name, parameter in trained.model.named_parameters():
        if name.endswith("noise_weight_2"):
            parameter.zero_()
    x = trained.decode(trained.z(1, 0).expand(2, -1), noise="random")
    assert (x[0] - x[1]).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["style", "modulated"])
def test_truncation(runs: Runs, name: str) -> None:
    trained = load(runs[name])
    x = trained.sample(4)
    torch.testing.assert_close(trained.sample(4, truncation_psi=1.0), x)
    average = trained.sample(4, truncation_psi=0.0, noise="fixed")
    torch.testing.assert_close(average, average[:1].expand_as(average))
    styles = trained.styles(trained.z(4))
    torch.testing.assert_close(
        trained.styles(trained.z(4), truncation_psi=0.5), 0.5 * (styles + trained.model.decoder.dlatent_avg)
    )
    with pytest.raises(UserError, match="psi is 3"):
        trained.sample(1, truncation_psi=3.0)


def test_styles_are_a_way_of_their_own(runs: Runs) -> None:
    trained, z = load(runs["style"], batch=2), load(runs["style"]).z(3, 5)
    torch.testing.assert_close(trained.synthesise(trained.styles(z)), trained.decode(z))
    assert trained.style_resolutions() == [4, 4, 8, 8, 16, 16]
    assert load(runs["growing"]).style_resolutions() == [4, 4, 8, 8]
    assert load(runs["modulated"]).style_resolutions() == [4, 8, 8, 16, 16, 16]
    assert trained.has_styles and isinstance(trained.model.decoder, StyledDecoder)


def test_models_without_styles_say_so(runs: Runs) -> None:
    trained = load(runs["residual"])
    assert not trained.has_styles
    z = trained.z(1)
    for call in (trained.styles, trained.synthesise, lambda z: trained.decode(z, truncation_psi=0.7)):
        with pytest.raises(UserError, match=r"model \(residual\) has no styles"):
            call(z)


def test_looking_moves_no_average_style(tmp_path: Path) -> None:
    trained = load(save(tmp_path, {**STYLE, "dlatent_avg_updates": "published"}))
    before = trained.model.decoder.dlatent_avg.clone()
    trained.sample(4)
    assert torch.equal(trained.model.decoder.dlatent_avg, before)


def test_reconstruction(runs: Runs) -> None:
    trained = load(runs["residual"])
    x = torch.rand(5, 3, 16, 16)
    posterior = trained.encode(x)
    torch.testing.assert_close(trained.reconstruct(x), trained.decode(posterior.mu))
    drawn = trained.reconstruct(x, posterior_sample=True)
    torch.testing.assert_close(drawn, load(runs["residual"], batch=2).reconstruct(x, posterior_sample=True))
    torch.testing.assert_close(drawn[2:], trained.reconstruct(x[2:], posterior_sample=True, first=2))
    assert not torch.allclose(drawn, trained.reconstruct(x))
    low, high = trained.input_range or (0, 0)
    assert drawn.min() >= low and drawn.max() <= high


def test_labels(runs: Runs) -> None:
    trained = load(runs["conditional"])
    one, two = (trained.sample(2, condition=trained.condition(label, 2)) for label in (1, 2))
    assert one.shape == (2, 1, 16, 16) and not torch.allclose(one, two)
    both = trained.sample(2, condition=trained.condition(torch.tensor([1, 2]), 2))
    torch.testing.assert_close(both, torch.stack([one[0], two[1]]))
    for label, message in [(3, "label 3 is no class"), (-1, "label -1 is no class"), (None, "needs a label")]:
        with pytest.raises(UserError, match=message):
            trained.condition(label, 2)
    with pytest.raises(UserError, match="unconditional"):
        load(runs["style"]).condition(0, 1)


def test_which_weights_and_where(runs: Runs) -> None:
    x = load(runs["style"]).sample(2)
    assert not torch.allclose(load(runs["style"], average=False).sample(2), x)
    (folder,) = (runs["style"] / "checkpoints").glob("nimg-*")
    torch.testing.assert_close(sivae_dist.load(folder).sample(2), x)
    torch.testing.assert_close(load(runs["style"], device="auto").sample(2).cpu(), x, atol=1e-3, rtol=1e-3)
    half = load(runs["style"], precision="bf16").sample(2)
    assert half.dtype == torch.float32
    assert 0 < (half - x).abs().max() < 0.1
    for device in ("cuda:99", "toaster"):
        with pytest.raises(UserError, match=f"the device '{device}' cannot be used"):
            load(runs["style"], device=device)
    with pytest.raises(UserError, match="batch is 0"):
        load(runs["style"], batch=0)


def test_a_growing_model_is_used_at_its_level(runs: Runs) -> None:
    trained = load(runs["growing"])
    assert trained.sample(1).shape == (1, 3, 8, 8)
    assert 0 < trained.model.decoder.blend < 1


def test_double_stays_double(runs: Runs) -> None:
    trained = load(runs["points"])
    double = Trained(trained.model.double(), replace(trained.config), 0)
    assert double.sample(2).dtype == torch.float64
