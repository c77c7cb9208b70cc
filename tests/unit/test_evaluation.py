"""PSNR, sliced Wasserstein distance and image grids: against closed forms and by their properties."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from sivae_dist.errors import UserError
from sivae_dist.evaluation.grids import grid, save_png
from sivae_dist.evaluation.reconstruction import mean_image_psnr, psnr
from sivae_dist.evaluation.sliced_wasserstein import sliced_wasserstein, wasserstein_1d


def draws(seed: int, *shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


# ---- PSNR


def test_psnr_closed_form() -> None:
    x = torch.full((2, 3, 4, 4), 0.5)
    x_hat = x + torch.tensor([0.1, 0.01]).view(2, 1, 1, 1)
    assert torch.allclose(psnr(x, x_hat, (0.0, 1.0)), torch.tensor([20.0, 40.0], dtype=torch.float64), atol=1e-4)
    # The same error in a range twice as wide is 20 log10(2) dB less of it.
    assert torch.allclose(psnr(x, x_hat, (-1.0, 1.0)), psnr(x, x_hat, (0.0, 1.0)) + 20 * math.log10(2))


def test_psnr_clamps_only_the_reconstruction_and_keeps_samples_apart() -> None:
    x = torch.ones(3, 1, 2, 2)
    x_hat = torch.stack([torch.full((1, 2, 2), v) for v in (7.0, 0.9, math.nan)])
    value = psnr(x, x_hat, (0.0, 1.0))
    assert value.shape == (3,)
    assert value[0] == math.inf and abs(value[1] - 20) < 1e-4 and value[2].isnan()


def test_psnr_refuses_shapes_and_ranges() -> None:
    with pytest.raises(ValueError, match="one shape"):
        psnr(torch.zeros(2, 3), torch.zeros(1, 3), (0, 1))
    with pytest.raises(UserError, match="low < high"):
        psnr(torch.zeros(2, 3), torch.zeros(2, 3), (1, 1))


def test_mean_image_psnr() -> None:
    images = draws(0, 50, 3, 8, 8)
    own = mean_image_psnr(images, (0.0, 1.0))
    assert own.shape == (50,)
    # Uniform noise around its mean has variance 1/12; the sample mean itself removes a fiftieth of it.
    assert abs(own.mean().item() - 10 * math.log10(12 * 50 / 49)) < 0.1
    other = mean_image_psnr(images, (0.0, 1.0), mean=torch.zeros(3, 8, 8))
    assert abs(other.mean().item() - 10 * math.log10(3)) < 0.1


# ---- sliced Wasserstein


def test_wasserstein_1d_against_repetition() -> None:
    # Repeating every value leaves a distribution unchanged, so unequal counts reduce to the equal case, which is the
    # mean absolute difference of sorted values.
    a, b = draws(1, 4, 6).double(), draws(2, 4, 15).double()
    same_count = (a.repeat(1, 5).sort(dim=1).values - b.repeat(1, 2).sort(dim=1).values).abs().mean(dim=1)
    assert torch.allclose(wasserstein_1d(a, b), same_count, atol=1e-14)


def test_wasserstein_1d_by_hand() -> None:
    # Quantile functions 0, 3 (halves) and 1, 1, 4 (thirds): |0-1| on [0, 1/2], |3-1| on [1/2, 2/3], |3-4| on the rest.
    value = wasserstein_1d(torch.tensor([[3.0, 0.0]]), torch.tensor([[1.0, 4.0, 1.0]]))
    assert value.item() == pytest.approx(1 / 2 + 2 / 6 + 1 / 3)


@pytest.mark.parametrize("shift", [0.25, -3.0])
def test_translation_in_one_dimension_is_exact(shift: float) -> None:
    a = draws(3, 40, 1).double()
    assert sliced_wasserstein(a, a + shift, projections=5) == pytest.approx(abs(shift), rel=1e-12)


def test_translation_in_many_dimensions() -> None:
    # Every slice is a translation by <theta, shift>; E|<theta, shift>| = |shift| sqrt(2 / (pi D)) for large D.
    a, shift = draws(4, 30, 3, 10, 10).double(), torch.full((3, 10, 10), 0.5).double()
    expected = 0.5 * math.sqrt(300) * math.sqrt(2 / (math.pi * 300))
    assert sliced_wasserstein(a, a + shift, projections=2000) == pytest.approx(expected, rel=0.05)


def test_zero_symmetric_and_blind_to_order() -> None:
    a, b = draws(5, 24, 3, 8, 8), draws(6, 17, 3, 8, 8) ** 2
    shuffled = a[torch.randperm(24, generator=torch.Generator().manual_seed(0))]
    assert sliced_wasserstein(a, a) == 0.0
    assert sliced_wasserstein(a, shuffled) == pytest.approx(0.0, abs=1e-12)
    assert sliced_wasserstein(a, torch.cat([a, a])) == pytest.approx(0.0, abs=1e-12)
    assert sliced_wasserstein(a, b) == pytest.approx(sliced_wasserstein(b, a), rel=1e-12)
    assert sliced_wasserstein(shuffled, b) == pytest.approx(sliced_wasserstein(a, b), rel=1e-12)
    assert sliced_wasserstein(a, b) > 0.01


def test_deterministic_for_a_seed() -> None:
    a, b = draws(5, 24, 3, 8, 8), draws(6, 24, 3, 8, 8) ** 2
    first = sliced_wasserstein(a, b, projections=70, seed=1)
    torch.manual_seed(123)
    assert sliced_wasserstein(a, b, projections=70, seed=1) == first
    assert sliced_wasserstein(a, b, projections=70, seed=2) != first


def test_falls_as_distributions_approach() -> None:
    real, other, noise = draws(7, 200, 2, 6, 6), draws(8, 200, 2, 6, 6), draws(9, 200, 2, 6, 6)
    values = [sliced_wasserstein(real, other + t * (0.5 + noise)) for t in (1.0, 0.5, 0.25, 0.1, 0.0)]
    assert values == sorted(values, reverse=True) and values[0] > 4 * values[-1]


def test_sees_a_missing_mode_and_a_wrong_layout() -> None:
    left = torch.zeros(64, 1, 8, 8)
    left[:, :, :, :4] = 1.0
    both = torch.cat([left[:32], left[:32].flip(-1)])
    assert sliced_wasserstein(both, left) > 0.1
    assert sliced_wasserstein(left, left.flip(-1)) > 0.2


def test_input_range_and_size() -> None:
    a, b = draws(10, 20, 3, 16, 16), draws(11, 20, 3, 16, 16) ** 2
    wide = sliced_wasserstein(a * 2 - 1, b * 2 - 1, input_range=(-1.0, 1.0))
    assert wide == pytest.approx(sliced_wasserstein(a, b, input_range=(0.0, 1.0)), rel=1e-4)
    assert sliced_wasserstein(a, b + 5, input_range=(0.0, 1.0)) == sliced_wasserstein(
        a, torch.ones_like(b), input_range=(0.0, 1.0)
    )
    pool = torch.nn.functional.avg_pool2d
    assert sliced_wasserstein(a, b, size=8) == pytest.approx(sliced_wasserstein(pool(a, 2), pool(b, 2)), rel=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("which", [0, 1])
def test_non_finite_samples_are_an_error(bad: float, which: int) -> None:
    sets = [draws(12, 5, 3, 4, 4), draws(13, 5, 3, 4, 4)]
    sets[which][2, 0, 1, 1] = bad
    for input_range in (None, (0.0, 1.0)):  # clamping must not hide an infinity
        with pytest.raises(UserError, match="1 of 5 " + ("real", "fake")[which]):
            sliced_wasserstein(sets[0], sets[1], input_range=input_range)


def test_sliced_wasserstein_refuses_bad_arguments() -> None:
    a = draws(14, 5, 3, 4, 4)
    with pytest.raises(UserError, match="fake set is empty"):
        sliced_wasserstein(a, a[:0])
    with pytest.raises(UserError, match="projections"):
        sliced_wasserstein(a, a, projections=0)
    with pytest.raises(ValueError, match="do not match"):
        sliced_wasserstein(a, a[:, :1])


# ---- grids


def test_grid_places_enlarges_and_scales() -> None:
    row = torch.stack([torch.full((3, 4, 6), v) for v in (-1.0, 0.0, 3.0)])  # black, grey, clamped to white
    row[0, 0, 0, 0] = 1.0
    picture = grid([row, row[:1]], (-1.0, 1.0), min_cell=11, separator=3)
    assert picture.dtype == np.uint8 and picture.shape == (2 * 8 + 3, 3 * 12 + 2 * 3, 3)  # 6 x 2 reaches 11
    assert (picture[0:2, 0:2] == (255, 0, 0)).all() and (picture[2:8, 0:12] == 0).all()
    assert (picture[0:8, 15:27] == 128).all() and (picture[0:8, 30:42] == 255).all()
    assert (picture[8:11] == 255).all() and (picture[0:8, 12:15] == 255).all()  # separators
    assert (picture[11:13, 0:2] == (255, 0, 0)).all() and (picture[11:19, 12:] == 255).all()  # second line, empty cells


def test_grid_grey_shrinking_and_non_finite() -> None:
    row = torch.zeros(1, 1, 8, 8)
    row[..., 0:2, 0:2] = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    assert grid([row], (0, 1), max_cell=4, min_cell=1).shape == (4, 4, 3)
    assert (grid([row], (0, 1), max_cell=4, min_cell=1)[0, 0] == 128).all()
    row[..., 3, 3], row[..., 4, 4] = math.nan, math.inf
    picture = grid([row], (0, 1), min_cell=1)
    magenta = (picture == (255, 0, 255)).all(axis=2)
    assert magenta.sum() == 2 and magenta[3, 3] and magenta[4, 4]


def test_grid_refuses_what_it_cannot_show() -> None:
    for rows in (
        [],
        [torch.zeros(3, 4, 4)],
        [torch.zeros(1, 2, 4, 4)],
        [torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 8, 8)],
    ):
        with pytest.raises(ValueError, match="grid wants"):
            grid(rows, (0, 1))


def test_save_png_is_whole_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture = grid([draws(15, 2, 3, 8, 8)], (0, 1))
    path = tmp_path / "new" / "grid.png"
    save_png(path, picture)
    assert np.array_equal(np.asarray(Image.open(path)), picture)

    def half(self: Image.Image, file: object, **_: object) -> None:
        file.write(b"half")  # type: ignore[attr-defined]
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", half)
    with pytest.raises(OSError, match="disk full"):
        save_png(path, picture[::2])
    monkeypatch.undo()
    assert np.array_equal(np.asarray(Image.open(path)), picture)
    assert [p.name for p in path.parent.iterdir()] == ["grid.png"]
