"""The embedded model: its scenes, its size and its quality."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.progress import Progress

from recache_compile.errors import RecacheError
from recache_compile.models.registry import EMBEDDED
from recache_compile.models.shapes import train
from recache_compile.models.shapes.classifier import load_classifier
from recache_compile.models.shapes.evaluate import classifier_accuracy, draw, held_out_scenes
from recache_compile.models.shapes.pipeline import pack, unpack
from recache_compile.models.shapes.scenes import ATTRIBUTES, parse_caption, render, sample_scene
from recache_compile.models.shapes.train import flow_matching_loss, new_pipeline

OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


@given(st.integers(0, 10**6))
def test_captions_say_all_of_a_scene(seed: int) -> None:
    scene = sample_scene(random.Random(seed))
    assert parse_caption(scene.caption()) == scene
    for names, value in zip(ATTRIBUTES.values(), scene.attributes(), strict=True):
        assert 0 <= value < len(names)


@given(st.integers(0, 10**6))
def test_a_scene_told_from_the_other_side_has_equal_attributes(seed: int) -> None:
    scene = sample_scene(random.Random(seed))
    mirrored = type(scene)(
        scene.other_color, scene.other_shape, OPPOSITE[scene.relation], scene.color, scene.shape, scene.background
    )
    assert mirrored.attributes() == scene.attributes()


@pytest.mark.parametrize("caption", ["", "a red circle", "a pink circle above a red ring on a dark background"])
def test_other_captions_are_refused(caption: str) -> None:
    with pytest.raises(ValueError, match="expected"):
        parse_caption(caption)


def test_rendering_is_deterministic_and_in_range() -> None:
    _, attributes = held_out_scenes(16)
    one, two = (render(attributes, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(one, two)
    assert one.shape == (16, 3, 32, 32)
    assert -1 <= one.min() < -0.5 < 0.5 < one.max() <= 1


def test_packing_is_invertible() -> None:
    pictures = torch.randn(2, 3, 32, 32)
    assert pack(pictures).shape == (2, 64, 48)
    assert torch.equal(unpack(pack(pictures), 32), pictures)


def test_prompts_with_unknown_words_are_refused(shapes: Any) -> None:
    with pytest.raises(RecacheError, match=r"unknown \['elephant', 'purple'\]"):
        shapes("a purple elephant", num_inference_steps=1)
    with pytest.raises(RecacheError, match="at most 12"):
        shapes("a " * 13, num_inference_steps=1)


def test_training_takes_a_step() -> None:
    with torch.enable_grad():
        pipeline = new_pipeline()
        flow_matching_loss(pipeline, 0, 2, torch.device("cpu")).backward()
        gradients = [parameter.grad for parameter in pipeline.transformer.parameters()]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)


class KilledError(Exception):
    pass


def test_an_interrupted_training_resumes_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "SAVE_EVERY", 2)
    device, loss = torch.device("cpu"), train.flow_matching_loss

    def run(folder: Path) -> dict[str, torch.Tensor]:
        folder.mkdir(exist_ok=True)
        with torch.enable_grad(), Progress(disable=True) as progress:
            pipeline = train.train_pipeline(folder / "state.pt", 4, 2, device, progress)
        return pipeline.transformer.state_dict()

    def killed_at_step_3(pipeline: Any, seed: int, batch: int, device: torch.device) -> torch.Tensor:
        if seed == 3:
            raise KilledError
        return loss(pipeline, seed, batch, device)

    straight = run(tmp_path / "straight")
    with monkeypatch.context() as patch, pytest.raises(KilledError):
        patch.setattr(train, "flow_matching_loss", killed_at_step_3)
        run(tmp_path / "resumed")
    resumed = run(tmp_path / "resumed")
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)


def test_weights_are_small() -> None:
    size = sum(file.stat().st_size for file in EMBEDDED["shapes"].weights.rglob("*") if file.is_file())
    assert size <= 10_000_000


def test_the_classifier_reads_held_out_scenes() -> None:
    assert classifier_accuracy(load_classifier(), 512).min() >= 0.97


@pytest.mark.slow
def test_nine_attributes_in_ten_are_recognised_in_samples() -> None:
    scenes, attributes = held_out_scenes(48)
    pictures = draw([scene.caption() for scene in scenes], steps=50, batch=48)
    recognised = load_classifier().recognised(pictures * 2 - 1, attributes)
    assert recognised.float().mean() >= 0.9
