"""Pipelines: loading, recording and standing in for the transformer."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import recache_compile as rc
from recache_compile.errors import DispatchError, ModelError, RuntimeUnavailableError
from recache_compile.loading import load_pipeline
from recache_compile.measure import psnr
from recache_compile.recording import record_examples
from tests.conftest import PROMPT

STEPS = 8


@pytest.fixture(scope="module")
def compiled(shapes: Any) -> rc.Compiled:
    return rc.compile(shapes, budgets=(3, STEPS), num_steps=STEPS, runtime="eager", call={"prompt": PROMPT})


@pytest.fixture
def pipeline(shapes: Any) -> Any:
    """A pipeline of its own that shares the model."""
    fresh = type(shapes)(shapes.transformer, copy.deepcopy(shapes.scheduler), shapes.text_encoder)
    fresh.set_progress_bar_config(disable=True)
    return fresh


def draw(pipeline: Any, prompt: str = PROMPT, seed: int = 0, **options: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    options = {"num_inference_steps": STEPS, "output_type": "pt"} | options
    return pipeline(prompt, generator=generator, **options).images


def test_full_budget_draws_the_same_picture(pipeline: Any, compiled: rc.Compiled) -> None:
    expected = draw(pipeline)
    rc.accelerate(pipeline, compiled, budget=STEPS)
    assert psnr(draw(pipeline), expected) >= 60


def test_the_budget_can_change_per_call(pipeline: Any, compiled: rc.Compiled) -> None:
    rc.accelerate(pipeline, compiled, budget=3)
    small = draw(pipeline)
    full = draw(pipeline, budget=STEPS)
    assert not torch.equal(small, full)
    assert torch.equal(draw(pipeline), small)
    pipeline.transformer.budget = STEPS
    assert torch.equal(draw(pipeline), full)


def test_prompts_and_seeds_do_not_leak(pipeline: Any, compiled: rc.Compiled) -> None:
    rc.accelerate(pipeline, compiled, budget=3)
    other = "a green cross above a cyan diamond on a light background"
    first = draw(pipeline)
    draw(pipeline, other, seed=1)
    assert torch.equal(draw(pipeline), first)


def test_guidance_branches_are_kept_apart(pipeline: Any, compiled: rc.Compiled) -> None:
    expected = draw(pipeline, guidance_scale=2.0)
    rc.accelerate(pipeline, compiled, budget=STEPS)
    assert psnr(draw(pipeline, guidance_scale=2.0), expected) >= 60


def test_the_original_weights_are_not_needed(shapes: Any, pipeline: Any, compiled: rc.Compiled) -> None:
    expected = draw(rc.accelerate(pipeline, compiled, budget=3))
    without = load_pipeline("shapes", transformer=None)
    without.set_progress_bar_config(disable=True)
    assert torch.equal(draw(rc.accelerate(without, compiled, budget=3)), expected)
    assert without.transformer.config.num_layers == shapes.transformer.config.num_layers
    assert without.transformer.dtype == torch.float32
    assert without.transformer.device == torch.device("cpu")


def test_callbacks_still_run(pipeline: Any, compiled: rc.Compiled) -> None:
    seen = []

    def callback(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append(step)
        return tensors

    draw(rc.accelerate(pipeline, compiled), callback_on_step_end=callback)
    assert seen == list(range(STEPS))


def test_the_default_budget_is_the_smallest(pipeline: Any, compiled: rc.Compiled) -> None:
    assert rc.accelerate(pipeline, compiled).transformer.budget == 3


def test_accelerating_twice_is_as_accelerating_once(pipeline: Any, compiled: rc.Compiled) -> None:
    rc.accelerate(pipeline, compiled, budget=STEPS)
    rc.accelerate(pipeline, compiled, budget=3)
    assert [base.__name__ for base in type(pipeline).__mro__].count("ShapesPipeline") == 2
    draw(pipeline)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_inference_steps": 5}, "runs 5 steps, but 8 were compiled: pass num_inference_steps=8"),
        ({"budget": 4}, "budget 4 was not compiled"),
        ({"num_images_per_prompt": 2}, r"hidden_states is float32\[2, 64, 48\], compiled float32\[1, 64, 48\]"),
    ],
)
def test_what_was_not_compiled_is_refused(
    options: dict[str, Any], message: str, pipeline: Any, compiled: rc.Compiled
) -> None:
    rc.accelerate(pipeline, compiled)
    with pytest.raises(DispatchError, match=message):
        draw(pipeline, **options)


def test_a_recording_knows_shapes_and_timesteps(pipeline: Any) -> None:
    (example,) = record_examples(pipeline, STEPS, {"prompt": PROMPT, "guidance_scale": 3.0})
    assert example.inputs["hidden_states"].shape == (1, 64, 48)
    assert torch.allclose(example.timesteps["timestep"][:, 0] * 1000, pipeline.scheduler.timesteps)
    assert "forward" not in vars(pipeline.transformer)


def test_a_recording_that_fails_restores_the_transformer(pipeline: Any) -> None:
    with pytest.raises(ModelError, match="recording a call"):
        record_examples(pipeline, STEPS, {"prompt": "a purple elephant"})
    assert "forward" not in vars(pipeline.transformer)


def test_a_pipeline_without_transformer_is_refused() -> None:
    with pytest.raises(ModelError, match="no transformer to compile"):
        rc.compile(object())


def test_unknown_models_are_refused(tmp_path: Path) -> None:
    (tmp_path / "index").mkdir()
    with pytest.raises(ModelError, match="holds no pipeline"):
        load_pipeline(str(tmp_path / "index"))
    with pytest.raises(ModelError, match="not an embedded model"):
        load_pipeline("no such model")


def test_a_damaged_pipeline_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text("{")
    with pytest.raises(ModelError, match=str(tmp_path)):
        load_pipeline(str(tmp_path))


def test_a_missing_optional_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = {
        "_class_name": "FluxPipeline",
        "_diffusers_version": "0.42.0",
        "text_encoder": ["transformers", "CLIPTextModel"],
    }
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    monkeypatch.setattr("recache_compile.loading.find_spec", lambda name: None)
    with pytest.raises(
        RuntimeUnavailableError, match=r"text_encoder needs the package transformers; pip install .*\[hub\]"
    ):
        load_pipeline(str(tmp_path))
