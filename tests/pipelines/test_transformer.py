"""The compiled transformer in the embedded pipeline."""

import copy
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import recache_compile as rc
from recache_compile.artifact.restore import with_config
from recache_compile.errors import DispatchError
from recache_compile.evaluation.measure import psnr
from recache_compile.pipelines.load import load_pipeline
from recache_compile.pipelines.record import record_examples
from recache_compile.pipelines.transformer import CompiledTransformer
from tests.conftest import PROMPT

STEPS = 8


@pytest.fixture(scope="module")
def compiled(shapes: Any) -> rc.Compiled:
    call = {"prompt": PROMPT}
    return rc.compile(shapes, budgets=(3, STEPS), num_steps=STEPS, policy="uniform", runtime="eager", call=call)


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
        ({"budget": 0}, "budget 0: a budget is a whole number of steps from 1 on, or a share of them from 0.0 to 1.0"),
        ({"budget": 1.5}, "budget 1.5: a budget is a whole number"),
        ({"num_images_per_prompt": 2}, r"hidden_states is float32\[2, 64, 48\], compiled float32\[1, 64, 48\]"),
    ],
)
def test_what_was_not_compiled_is_refused(
    options: dict[str, Any], message: str, pipeline: Any, compiled: rc.Compiled
) -> None:
    rc.accelerate(pipeline, compiled)
    with pytest.raises(DispatchError, match=message):
        draw(pipeline, **options)


def test_the_step_is_looked_up_where_the_scheduler_does_not_tell_it(shapes: Any, compiled: rc.Compiled) -> None:
    (example,) = record_examples(shapes, STEPS, {"prompt": PROMPT})
    column = example.timesteps["timestep"]
    scheduler = SimpleNamespace(timesteps=column[:, 0].clone())
    transformer = CompiledTransformer(compiled, SimpleNamespace(scheduler=scheduler), STEPS)
    dispatcher = compiled.dispatcher(STEPS)
    for step, timestep in enumerate(column):
        inputs = {**example.inputs, "timestep": timestep}
        assert torch.equal(transformer(**inputs)[0], dispatcher(step=step, **inputs)[0])
    scheduler.timesteps[3] = scheduler.timesteps[2]
    with pytest.raises(DispatchError, match="the timestep is at several places in its table"):
        transformer(**example.inputs | {"timestep": column[2]})
    with pytest.raises(DispatchError, match="the timestep is not in its table"):
        transformer(**example.inputs | {"timestep": column[3]})


def test_the_configuration_is_given_out_as_attributes(pipeline: Any, compiled: rc.Compiled) -> None:
    rc.accelerate(pipeline, compiled)
    assert pipeline.transformer.in_channels == pipeline.transformer.config.in_channels == 48
    with pytest.raises(AttributeError, match="the compiled transformer has no 'rope'"):
        _ = pipeline.transformer.rope
    with pytest.raises(AttributeError, match=r"no method fuse_qkv_projections\(\), which its engines would not follow"):
        pipeline.transformer.fuse_qkv_projections()


def test_a_compilation_knows_whose_place_it_takes(pipeline: Any, compiled: rc.Compiled) -> None:
    other = with_config(compiled, component="transformer_2")
    pipeline.register_modules(transformer_2=None)
    rc.accelerate(pipeline, other)
    assert isinstance(pipeline.transformer_2, CompiledTransformer)
    assert not isinstance(pipeline.transformer, CompiledTransformer)


def test_the_fallback_warns_once_a_generation(pipeline: Any, compiled: rc.Compiled) -> None:
    rc.accelerate(pipeline, compiled, fallback="eager")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        draw(pipeline, num_images_per_prompt=2)
    assert [str(each.message)[:32] for each in caught] == ["running the original transformer"]


def test_the_fallback_is_moved_and_cast_with_the_pipeline(shapes: Any, pipeline: Any, compiled: rc.Compiled) -> None:
    pipeline.transformer = copy.deepcopy(shapes.transformer)
    rc.accelerate(pipeline, compiled, fallback="eager")
    pipeline.transformer.to(torch.float64)
    assert pipeline.transformer.original.dtype is torch.float64
