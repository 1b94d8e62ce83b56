"""Distances against independent references, and one sample at a time."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from skimage.metrics import structural_similarity
from torch import Tensor

from recache_compile.errors import ModelError, RuntimeUnavailableError
from recache_compile.evaluation import distances as module
from recache_compile.evaluation.distances import get_distance
from recache_compile.models.shapes.classifier import load_classifier
from tests.evaluation.scenes import scenes

DISTANCES = ("mse", "ssim", "features")


@pytest.fixture(scope="module")
def reference() -> Tensor:
    return scenes(4)[1]


@pytest.fixture(scope="module")
def noise(reference: Tensor) -> Tensor:
    return torch.randn(reference.shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", DISTANCES)
def test_a_distance_is_zero_of_equal_pictures(name: str, reference: Tensor) -> None:
    distances = get_distance(name, "shapes")(reference, reference.clone())
    assert distances.dtype == torch.float64
    assert distances.tolist() == pytest.approx([0.0] * 4, abs=1e-9)


@pytest.mark.parametrize("name", DISTANCES)
def test_a_distance_grows_with_every_bit_of_noise(name: str, reference: Tensor, noise: Tensor) -> None:
    distance = get_distance(name, "shapes")
    grown = [distance(reference + strength * noise, reference) for strength in (0.001, 0.01, 0.03, 0.1, 0.3)]
    assert grown[0].gt(0).all()
    assert all(less.lt(more).all() for less, more in pairwise(grown))


@pytest.mark.parametrize("name", DISTANCES)
def test_a_distance_knows_no_other_sample(name: str, reference: Tensor, noise: Tensor) -> None:
    distance, pictures = get_distance(name, "shapes"), reference + 0.1 * noise
    alone = torch.cat([distance(pictures[[row]], reference[[row]]) for row in range(4)])
    torch.testing.assert_close(distance(pictures, reference), alone, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("name", DISTANCES)
def test_a_video_is_as_far_as_its_frames_in_the_mean(name: str, reference: Tensor, noise: Tensor) -> None:
    distance, pictures = get_distance(name, "shapes"), reference + 0.1 * noise
    videos = distance(pictures.unflatten(0, (2, 2)), reference.unflatten(0, (2, 2)))
    torch.testing.assert_close(videos, distance(pictures, reference).unflatten(0, (2, 2)).mean(1), rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", DISTANCES)
def test_half_precision_pictures_are_judged_in_full(name: str, reference: Tensor, noise: Tensor) -> None:
    distance, pictures = get_distance(name, "shapes"), (reference + 0.1 * noise).bfloat16()
    halves = distance(pictures, reference.bfloat16())
    assert torch.equal(halves, distance(pictures.float(), reference.bfloat16().float()))


def test_mse_agrees_with_numpy(reference: Tensor, noise: Tensor) -> None:
    pictures = reference + 0.1 * noise
    expected = [np.mean((one - other) ** 2) for one, other in zip(pictures.numpy(), reference.numpy(), strict=True)]
    assert get_distance("mse", "some/model")(pictures, reference).tolist() == pytest.approx(expected, rel=1e-5)


def test_ssim_agrees_with_scikit_image(reference: Tensor, noise: Tensor) -> None:
    pictures = reference + 0.1 * noise
    padded = [
        np.pad(batch.double(), ((0, 0), (0, 0), (5, 5), (5, 5)), mode="reflect") for batch in (pictures, reference)
    ]
    settings = {"data_range": 1.0, "gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    expected = [
        1 - structural_similarity(one, other, channel_axis=0, **settings)
        for one, other in zip(*padded, strict=True)  # the mean leaves out what was padded
    ]
    assert get_distance("ssim", "some/model")(pictures, reference).tolist() == pytest.approx(expected, rel=1e-6)


def test_features_agree_with_the_formula_of_lpips(reference: Tensor, noise: Tensor) -> None:
    pictures, classifier = reference + 0.1 * noise, load_classifier()
    ours, theirs, expected = pictures * 2 - 1, reference * 2 - 1, []
    with torch.no_grad():
        for layer in classifier.stages:
            ours, theirs = layer(ours), layer(theirs)
            if isinstance(layer, torch.nn.GELU):
                cosine = torch.cosine_similarity(ours, theirs, dim=1)  # |a - b|^2 = 2 - 2 a.b of unit vectors
                expected.append((2 - 2 * cosine).mean((1, 2)))
    mean = torch.stack(expected).mean(0).tolist()
    assert get_distance("features", "shapes")(pictures, reference).tolist() == pytest.approx(mean, rel=1e-4)


def test_another_scene_is_farther_than_a_blemished_one(reference: Tensor, noise: Tensor) -> None:
    distance = get_distance("features", "shapes")
    assert distance(scenes(4, seed=1)[1], reference).gt(distance(reference + 0.03 * noise, reference)).all()


def test_auto_is_features_for_shapes() -> None:
    assert get_distance("auto", "shapes").name == "features"


def test_auto_is_lpips_where_it_can_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(module.DISTANCES, "lpips", lambda: module.mean_squared_error)
    assert get_distance("auto", "some/model").name == "lpips"


def test_auto_is_ssim_where_lpips_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> module.PictureDistance:
        raise RuntimeUnavailableError("no weights")

    monkeypatch.setitem(module.DISTANCES, "lpips", missing)
    assert get_distance("auto", "some/model").name == "ssim"


@pytest.mark.parametrize(
    ("name", "model", "message"),
    [
        ("psnr", "shapes", "distance 'psnr' is unknown; choose auto, mse, ssim, lpips, features"),
        ("caption", "a/b", "distance 'caption' is unknown; choose auto, mse, ssim, lpips"),
        ("features", "a/b", "judges pictures of shapes only, not of a/b; choose auto, mse, ssim, lpips"),
    ],
)
def test_a_name_that_does_not_fit_is_told_its_alternatives(name: str, model: str, message: str) -> None:
    with pytest.raises(ModelError) as caught:
        get_distance(name, model)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_pictures_of_another_size_are_refused(reference: Tensor) -> None:
    with pytest.raises(ModelError, match=r"distance mse: pictures \(4, 3, 16, 32\) and reference \(4, 3, 32, 32\)"):
        get_distance("mse", "shapes")(reference[:, :, :16], reference)


def test_what_is_no_picture_is_refused(reference: Tensor) -> None:
    with pytest.raises(ModelError, match=r"expected pictures \(batch, 3, H, W\) or videos .* shape \(4, 1, 32, 32\)"):
        get_distance("ssim", "shapes")(reference[:, :1], reference[:, :1])
