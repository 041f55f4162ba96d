"""The cosine series: by hand, against scipy, and back again."""

import pytest
import torch
from scipy.fft import dctn

from medistill.cosine import images_of, series, weights
from medistill.rng import Rng


def test_series_by_hand() -> None:
    images = torch.tensor([[[[1.0, 3.0], [5.0, 7.0]]]])
    assert torch.allclose(series(images), torch.tensor([[[[8.0, -2.0], [-4.0, 0.0]]]]), atol=1e-6)


@pytest.mark.parametrize("shape", [(5, 8), (4, 3, 6)])
def test_series_is_scipys_orthonormal_transform_and_goes_back(shape: tuple[int, ...]) -> None:
    images = torch.randn((2, 3, *shape), generator=Rng(0).at("images"), dtype=torch.float64)
    axes = tuple(range(2, images.ndim))
    found = series(images)
    assert torch.allclose(found, torch.from_numpy(dctn(images, axes=axes, norm="ortho")))
    assert torch.allclose(images_of(found), images)


def test_weights_fall_with_frequency_and_keep_the_mean_square() -> None:
    found = weights((3, 5), 1.5, torch.zeros(1))
    assert float(found.square().mean()) == pytest.approx(1)
    assert float(found[0, 0] / found[0, 4]) == pytest.approx(5**1.5)
    assert float(found[0, 0] / found[2, 1]) == pytest.approx((1 + 5**0.5) ** 1.5)
    assert torch.equal(weights((3, 5), 0.0, torch.zeros(1)), torch.ones(3, 5))
