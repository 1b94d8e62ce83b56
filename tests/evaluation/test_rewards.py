"""Rewards against independent references, and one sample at a time."""

import numpy as np
import pytest
import torch
from torch import Tensor

from recache_compile.errors import ModelError
from recache_compile.evaluation.rewards import get_reward
from recache_compile.models.shapes.classifier import load_classifier
from tests.evaluation.scenes import scenes


@pytest.fixture(scope="module")
def reference() -> Tensor:
    return scenes(4)[1]


def test_no_reward_is_zero(reference: Tensor) -> None:
    rewards = get_reward("none", "some/model")(reference, ["a"] * 4)
    assert rewards.dtype == torch.float64
    assert rewards.tolist() == [0.0] * 4


def test_the_right_caption_is_rewarded_most() -> None:
    drawn, pictures = scenes(16)
    captions, reward = [scene.caption() for scene in drawn], get_reward("caption", "shapes")
    right = reward(pictures, captions)
    assert right.le(0).all()
    assert all(right.gt(reward(pictures, captions[by:] + captions[:by])).all() for by in range(1, 16))


def test_the_caption_reward_is_the_mean_of_six_log_probabilities() -> None:
    (scene, *_), pictures = scenes(1)
    with torch.no_grad():
        heads = [head[0].double().softmax(0) for head in load_classifier()(pictures * 2 - 1)]
    expected = np.mean([head[index].log().item() for head, index in zip(heads, scene.attributes(), strict=True)])
    reward = get_reward("caption", "shapes")(pictures, [scene.caption()]).item()
    assert reward == pytest.approx(expected, rel=1e-3, abs=1e-6)


def test_a_caption_reward_knows_no_other_sample() -> None:
    drawn, pictures = scenes(4)
    captions, reward = [scene.caption() for scene in drawn], get_reward("caption", "shapes")
    noisy = (pictures + 0.3 * torch.randn(pictures.shape, generator=torch.Generator().manual_seed(1))).clamp(0, 1)
    alone = torch.cat([reward(noisy[[row]], [captions[row]]) for row in range(4)])
    torch.testing.assert_close(reward(noisy, captions), alone, rtol=1e-4, atol=1e-6)


def test_a_video_is_rewarded_for_its_frames_in_the_mean() -> None:
    (scene, *_), pictures = scenes(4)
    reward, caption = get_reward("caption", "shapes"), scene.caption()
    video = reward(pictures[None], [caption])
    torch.testing.assert_close(video, reward(pictures, [caption] * 4).mean(0, keepdim=True), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("name", "model", "message"),
    [
        ("beauty", "shapes", "reward 'beauty' is unknown; choose none, caption, attributes, clip, hpsv2, imagereward"),
        ("caption", "a/b", "judges pictures of shapes only, not of a/b; choose none, clip, hpsv2"),
    ],
)
def test_a_name_that_does_not_fit_is_told_its_alternatives(name: str, model: str, message: str) -> None:
    with pytest.raises(ModelError) as caught:
        get_reward(name, model)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_sample_needs_a_prompt(reference: Tensor) -> None:
    with pytest.raises(ModelError, match="reward none: 1 prompts for 4 samples; give one for each"):
        get_reward("none", "shapes")(reference, ["a"])


def test_a_prompt_that_is_no_caption_is_told_the_form(reference: Tensor) -> None:
    with pytest.raises(ModelError, match="reward caption: caption 'a cat': expected 'a COLOR SHAPE"):
        get_reward("caption", "shapes")(reference[:1], ["a cat"])
