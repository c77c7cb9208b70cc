"""The noise of a stochastic decoder under evaluation: every image its own, whatever batch or rank it falls into."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from sivae_dist.data import HostBatch
from sivae_dist.distributed.group import Group
from sivae_dist.engine.evaluate import EvalConfig, Evaluator
from sivae_dist.engine.precision import Precision
from sivae_dist.models import unmoved
from sivae_dist.models.style import StyleAutoencoder, StyleConfig

IMAGES = 12


class Held:
    """A stream with held-out images only: those of one rank."""

    def __init__(self, rank: int = 0, ranks: int = 1) -> None:
        self.numbers = torch.arange(IMAGES)[rank::ranks]

    def held_out(self, limit: int, batch: int) -> list[HostBatch]:
        data = torch.randint(0, 256, (IMAGES, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        return [HostBatch(data[part], part) for part in self.numbers[:limit].split(batch)]


@pytest.fixture(scope="module")
def model() -> StyleAutoencoder:
    torch.manual_seed(0)
    built = StyleConfig.tiny().build()
    for name, parameter in built.named_parameters():
        if "noise_weight" in name:
            parameter.data.fill_(0.5)
    return built.eval()


def evaluator(held: Held | None = None, **settings: Any) -> Evaluator:
    config = EvalConfig(images=IMAGES, **settings)
    stream: Any = held or Held()
    return Evaluator(config, stream, Group(), torch.device("cpu"), Precision(), seed=7)


def decoded(judge: Evaluator, model: StyleAutoencoder) -> dict[str, dict[int, Tensor]]:
    """By purpose: image number -> what the decoder made of one and the same z."""
    found: dict[str, dict[int, Tensor]] = {"rec": {}, "prior": {}}
    for batch in judge._batches(model):
        players = judge.precision.players(model, drawing=judge._drawing(batch))
        for purpose, images in found.items():
            x = players.decoder(torch.ones(len(batch), 5), purpose)
            images.update(zip(batch.position.tolist(), x, strict=True))
    return found


def test_every_image_has_its_own_noise_on_any_number_of_ranks(model: StyleAutoencoder) -> None:
    whole = decoded(evaluator(batch=5), model)
    parts = [decoded(evaluator(Held(rank, 3), batch=2), model) for rank in range(3)]
    for purpose, images in whole.items():
        assert len(images) == IMAGES
        for number, image in images.items():
            torch.testing.assert_close(parts[number % 3][purpose][number], image)
        assert (images[0] - images[1]).abs().max() > 1e-3
    assert (whole["rec"][0] - whole["prior"][0]).abs().max() > 1e-3


def test_metrics_use_it_and_repeat(model: StyleAutoencoder) -> None:
    judge = evaluator(batch=5)
    results = judge.metrics(model)
    assert judge.metrics(model) == results
    assert evaluator(batch=3).metrics(model) == pytest.approx(results, rel=1e-5)
    fixed = evaluator(batch=5, noise="fixed").metrics(model)
    assert fixed["eval/psnr_mean_image"] == results["eval/psnr_mean_image"]
    for name in ("eval/psnr", "eval/swd"):
        assert abs(fixed[name] - results[name]) > 1e-4 * abs(results[name])


def test_fixed_noise_is_the_decoders_own(model: StyleAutoencoder) -> None:
    judge = evaluator(batch=4, noise="fixed")
    images = decoded(judge, model)["prior"]
    torch.testing.assert_close(images[3], model.decode(torch.ones(1, 5))[0])


def test_pictures_show_what_metrics_judge(model: StyleAutoencoder) -> None:
    judge = evaluator(batch=4)
    pictures = judge.pictures(model, model, columns=3)
    assert (pictures["images/prior"] == pictures["images/prior_ema"]).all()
    fixed = evaluator(batch=4, noise="fixed").pictures(model, model, columns=3)
    assert (pictures["images/prior"] != fixed["images/prior"]).any()
    assert (pictures["images/real"] == fixed["images/real"]).all()


def test_pictures_of_one_tag_are_as_high_as_wide(model: StyleAutoencoder) -> None:
    """TensorBoard shows each in a narrow card; in the grid a column belongs together."""
    pictures = evaluator(batch=4).pictures(model, model, columns=4)
    side = pictures["images/real"].shape[0]
    assert {picture.shape for tag, picture in pictures.items() if tag != "grid"} == {(side, side, 3)}
    cell = (side - 2) // 2
    assert pictures["grid"].shape == (3 * cell + 4, 4 * cell + 6, 3)
    below = pictures["images/real"][cell + 2 :, :cell]
    assert (below == pictures["grid"][:cell, 2 * (cell + 2) : 3 * cell + 4]).all()  # the third


def test_looking_moves_no_average() -> None:
    """Published code moves the average style in evaluation; on ranks with other held-out images it would part."""
    torch.manual_seed(0)
    model = replace(StyleConfig.tiny(), dlatent_avg_updates="published").build().eval()
    before = model.decoder.dlatent_avg.clone()
    judge = evaluator(batch=5)
    judge.metrics(model)
    assert not torch.equal(model.decoder.dlatent_avg, before)  # so there is something to put back
    model.decoder.dlatent_avg.copy_(before)
    with unmoved(model):
        judge.metrics(model)
        judge.pictures(model, model, 4)
    assert torch.equal(model.decoder.dlatent_avg, before)
