"""Picture distances and the comparison's picture."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio

from recache_compile.evaluation.measure import psnr, ssim
from recache_compile.evaluation.picture import save_comparison
from recache_compile.ir.schedule import Schedule


def test_psnr_against_scikit_image() -> None:
    one, two = torch.rand(1, 3, 16, 16), torch.rand(1, 3, 16, 16)
    assert psnr(one, two) == pytest.approx(peak_signal_noise_ratio(one.numpy(), two.numpy(), data_range=1.0), abs=1e-4)


def test_equal_pictures_have_100_db_and_similarity_1() -> None:
    picture = torch.rand(1, 3, 32, 32)
    assert psnr(picture, picture) == 100
    assert ssim(picture, picture) == pytest.approx(1)


def test_the_comparison_is_a_picture(tmp_path: Path) -> None:
    pictures = {None: [torch.rand(3, 8, 8)], 2: [torch.rand(3, 8, 8)]}
    save_comparison(pictures, {2: Schedule((0, 3), 5)}, ["a caption"], tmp_path / "picture.png")
    assert [file.name for file in tmp_path.iterdir()] == ["picture.png"]
    assert Image.open(tmp_path / "picture.png").width > 200
