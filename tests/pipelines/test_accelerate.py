"""A pipeline on compiled engines is used as it was before; what was not compiled is told."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

import recache_compile as rc
from recache_compile.errors import CaptureError, DispatchError, MismatchError, ModelError
from tests.families import BUDGET, EXACT, SAME, STEPS, TINY, error, family, plain
from tests.tiny_pipelines import draw, stack

FLUX = TINY["flux"]
CALL = FLUX.call(0)
OTHERS = {
    "size": (
        CALL | {"height": 32, "width": 32},
        r"hidden_states is float32\[1, 64, 16\], compiled float32\[1, 16, 16\]; img_ids is float32\[64, 3\]",
    ),
    "batch": (
        stack(CALL, FLUX.call(1), FLUX.call(2)),
        r"hidden_states is float32\[3, 16, 16\], compiled float32\[1, 16, 16\]",
    ),
    "tokens": (
        CALL | {"prompt_embeds": torch.zeros(1, 9, 16)},
        r"encoder_hidden_states is float32\[1, 9, 16\], compiled float32\[1, 6, 16\]",
    ),
    "type": (
        {name: value.double() if isinstance(value, Tensor) else value for name, value in CALL.items()},
        r"encoder_hidden_states is float64\[1, 6, 16\], compiled float32\[1, 6, 16\]",
    ),
}


@pytest.fixture(scope="module")
def full() -> Tensor:
    """What the plain pipeline gives."""
    with torch.no_grad():
        return plain(FLUX, CALL)


@pytest.fixture(scope="module")
def small() -> Tensor:
    """What the engines give with the small budget."""
    with torch.no_grad():
        return draw(family("flux").pipeline(BUDGET), CALL, STEPS)


def test_callbacks_see_and_change_the_latents() -> None:
    seen: list[Tensor] = []

    def shrink(pipeline: Any, step: int, timestep: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        seen.append(tensors["latents"])
        return {"latents": 0.9 * tensors["latents"]}

    expected = plain(FLUX, CALL, callback_on_step_end=shrink)
    plain_ones, seen = seen, []
    assert error(draw(family("flux").pipeline(), CALL, STEPS, callback_on_step_end=shrink), expected) <= EXACT
    assert len(seen) == STEPS
    assert max(map(error, seen, plain_ones)) <= EXACT


def test_interrupted_and_failed_generations_leave_nothing_behind(small: Tensor) -> None:
    pipeline = family("flux").pipeline(BUDGET)

    def interrupt(pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        pipeline._interrupt = step >= 2
        return tensors

    def fail(pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        raise KeyError(step)

    draw(pipeline, FLUX.call(1), STEPS, callback_on_step_end=interrupt)
    assert error(draw(pipeline, CALL, STEPS), small) <= SAME
    with pytest.raises(KeyError):
        draw(pipeline, FLUX.call(1), STEPS, callback_on_step_end=fail, budget=STEPS)
    assert pipeline.transformer.budget == BUDGET
    assert error(draw(pipeline, CALL, STEPS), small) <= SAME


def test_the_transformer_tells_configuration_type_and_place() -> None:
    ours, theirs = family("flux").pipeline().transformer, FLUX.make().transformer
    assert ours.config.in_channels == ours.config["in_channels"] == theirs.config.in_channels
    assert ours.config.guidance_embeds is True
    assert list(ours.config.axes_dims_rope) == list(theirs.config.axes_dims_rope)
    assert (ours.dtype, ours.device) == (theirs.dtype, theirs.device)
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = ours.config.no_such_thing


def test_moves_that_change_nothing(full: Tensor) -> None:
    pipeline = family("flux").pipeline()
    assert pipeline.to("cpu") is pipeline
    assert pipeline.to(torch.float32) is pipeline
    assert (pipeline.dtype, pipeline.device) == (torch.float32, torch.device("cpu"))
    assert error(draw(pipeline, CALL, STEPS), full) <= EXACT


def test_a_change_of_type_is_told() -> None:
    pipeline = family("flux").pipeline().to(torch.bfloat16)
    call = {name: value.bfloat16() if isinstance(value, Tensor) else value for name, value in CALL.items()}
    with pytest.raises(MismatchError, match=r"hidden_states is bfloat16\[1, 16, 16\], compiled float32\[1, 16, 16\]"):
        draw(pipeline, call, STEPS)


@pytest.mark.parametrize("before", [False, True])
def test_model_offloading(before: bool, full: Tensor) -> None:
    pipeline = FLUX.make()
    if before:
        pipeline.enable_model_cpu_offload(device="cpu")
    rc.accelerate(pipeline, family("flux").parts, budget=STEPS)
    if not before:
        pipeline.enable_model_cpu_offload(device="cpu")
    for _ in range(2):
        assert error(draw(pipeline, CALL, STEPS), full) <= EXACT


def test_an_offloaded_transformer_is_compiled_once_its_hooks_are_removed(full: Tensor) -> None:
    pipeline = FLUX.make()
    pipeline.enable_model_cpu_offload(device="cpu")
    options = {"call": CALL, "num_steps": STEPS, "budgets": (STEPS,), "runtime": "eager"}
    with pytest.raises(
        CaptureError, match=r"is offloaded by accelerate, which cannot be traced; call remove_all_hooks"
    ):
        rc.compile(pipeline, **options)
    pipeline.remove_all_hooks()
    rc.accelerate(pipeline, rc.compile(pipeline, **options))
    pipeline.enable_model_cpu_offload(device="cpu")
    assert error(draw(pipeline, CALL, STEPS), full) <= EXACT


def test_group_offloading_and_slicing(full: Tensor) -> None:
    pipeline = family("flux").pipeline()
    pipeline.enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level")
    pipeline.enable_attention_slicing()
    pipeline.vae.enable_slicing()
    pipeline.vae.enable_tiling()
    assert error(draw(pipeline, CALL, STEPS), full) <= EXACT


def test_the_budget_can_change_per_call(full: Tensor, small: Tensor) -> None:
    pipeline = family("flux").pipeline(budget=None)
    assert pipeline.transformer.budget == BUDGET
    assert error(draw(pipeline, CALL, STEPS, budget=STEPS), full) <= EXACT
    assert error(draw(pipeline, CALL, STEPS), small) <= SAME
    pipeline.transformer.budget = STEPS
    assert error(draw(pipeline, CALL, STEPS), full) <= EXACT
    with pytest.raises(DispatchError, match="budget 0: a budget is a whole number of steps from 1 on, or a share"):
        draw(pipeline, CALL, STEPS, budget=0)
    assert pipeline.transformer.budget == STEPS


@pytest.mark.parametrize("kind", OTHERS)
def test_other_kinds_of_calls_are_refused_with_what_is_there(kind: str) -> None:
    call, message = OTHERS[kind]
    with pytest.raises(MismatchError, match=message):
        draw(family("flux").pipeline(), call, STEPS)


@pytest.mark.parametrize("kind", ["size", "batch", "tokens"])
def test_other_kinds_of_calls_fall_back(kind: str) -> None:
    call, _ = OTHERS[kind]
    pipeline = family("flux").pipeline(fallback="eager")
    with pytest.warns(UserWarning, match="running the original transformer: no engine for these inputs"):
        assert torch.equal(draw(pipeline, call, STEPS), plain(FLUX, call))


def test_there_must_be_something_to_fall_back_to() -> None:
    pipeline = FLUX.make()
    pipeline.transformer = None
    with pytest.raises(ModelError, match="fallback 'eager' needs the original weights, but the pipeline has no trans"):
        rc.accelerate(pipeline, family("flux").parts, fallback="eager")
    with pytest.raises(ModelError, match="fallback 'jit' is unknown; choose 'eager' or None"):
        rc.accelerate(FLUX.make(), family("flux").parts, fallback="jit")  # type: ignore[arg-type]


def test_a_saved_artifact_runs_a_pipeline_that_has_no_weights(tmp_path: Path, full: Tensor, small: Tensor) -> None:
    family("flux").parts["transformer"].save(tmp_path / "flux")
    pipeline = FLUX.make()
    pipeline.transformer = None
    rc.accelerate(pipeline, rc.load(tmp_path / "flux"), budget=STEPS)
    assert error(draw(pipeline, CALL, STEPS), full) <= EXACT
    assert error(draw(pipeline, CALL, STEPS, budget=BUDGET), small) <= SAME


def test_components_make_another_pipeline(full: Tensor) -> None:
    pipeline = family("flux").pipeline()
    assert sorted(pipeline.components) == sorted(FLUX.make().components)
    other = diffusers.FluxPipeline(**pipeline.components)
    other.set_progress_bar_config(disable=True)
    assert error(draw(other, CALL, STEPS), full) <= EXACT


def test_a_pipeline_of_another_kind_made_from_it() -> None:
    tiny, pipeline = TINY["flux-img2img"], family("flux").pipeline()
    draw(pipeline, CALL, STEPS)
    other = diffusers.AutoPipelineForImage2Image.from_pipe(pipeline)
    other.set_progress_bar_config(disable=True)
    assert isinstance(other, diffusers.FluxImg2ImgPipeline)
    for n in (0, 1):
        assert error(draw(other, tiny.call(n), STEPS), plain(tiny, tiny.call(n))) <= EXACT


def test_a_copy_with_a_scheduler_of_its_own(full: Tensor, small: Tensor) -> None:
    pipeline = family("flux").pipeline(BUDGET)
    other = copy.copy(pipeline)
    other.scheduler = copy.deepcopy(pipeline.scheduler)
    for one in (pipeline, other, pipeline):
        assert error(draw(one, CALL, STEPS), small) <= SAME
        assert error(draw(one, CALL, STEPS, budget=STEPS), full) <= EXACT


def test_a_deep_copy_has_a_state_of_its_own_and_the_same_engines(small: Tensor) -> None:
    pipeline = family("flux").pipeline(BUDGET)
    other = copy.deepcopy(pipeline)
    results: list[Tensor] = []

    def draw_the_other(pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step == 4:
            results.append(draw(other, FLUX.call(1), STEPS, budget=STEPS))
        return tensors

    family("flux").recomputed()
    assert error(draw(pipeline, CALL, STEPS, callback_on_step_end=draw_the_other), small) <= SAME
    assert error(results[0], plain(FLUX, FLUX.call(1))) <= EXACT
    assert family("flux").recomputed() == {"transformer": BUDGET + STEPS}
    pipeline.transformer = copy.deepcopy(pipeline.transformer)
    assert error(draw(pipeline, CALL, STEPS), small) <= SAME


def test_accelerating_again_replaces_what_was_there(small: Tensor) -> None:
    pipeline = family("flux").pipeline(fallback="eager")
    original = pipeline.transformer.original
    rc.accelerate(pipeline, family("flux").parts, budget=BUDGET, fallback="eager")
    assert pipeline.transformer.original is original is not None
    assert error(draw(pipeline, CALL, STEPS), small) <= SAME
    assert [base.__name__ for base in type(pipeline).__mro__].count("FluxPipeline") == 2


@pytest.mark.slow
def test_accelerating_one_transformer_after_the_other() -> None:
    this = family("wan-2.2")
    call, pipeline = this.tiny.call(0), this.tiny.make()
    for component, compiled in this.parts.items():
        rc.accelerate(pipeline, {component: compiled}, budget=BUDGET)
    small = draw(this.pipeline(BUDGET), call, STEPS)
    for _ in range(2):
        assert error(draw(pipeline, call, STEPS), small) <= SAME
    assert error(draw(pipeline, call, STEPS, budget=STEPS), plain(this.tiny, call)) <= EXACT


@pytest.mark.slow
def test_one_of_two_transformers_may_stay_as_it_is() -> None:
    this = family("wan-2.2")
    pipeline = rc.accelerate(this.tiny.make(), this.parts["transformer"], budget=STEPS)
    assert error(draw(pipeline, this.tiny.call(0), STEPS), plain(this.tiny, this.tiny.call(0))) <= EXACT


@pytest.mark.slow
def test_a_budget_that_one_of_two_transformers_lacks_changes_neither() -> None:
    this = family("wan-2.2")
    second = this.parts["transformer_2"]
    other = second.engines.with_plans({BUDGET: second.schedules[BUDGET]}, second.forecaster)
    pipeline = rc.accelerate(this.tiny.make(), {**this.parts, "transformer_2": other}, budget=BUDGET)
    with pytest.raises(DispatchError, match="budget 5 was not compiled; there are 3, whose schedules were given"):
        draw(pipeline, this.tiny.call(0), STEPS, budget=5)
    assert pipeline.transformer.budget == pipeline.transformer_2.budget == BUDGET


def test_the_original_can_be_given_back(full: Tensor) -> None:
    pipeline = family("flux").pipeline(BUDGET)
    with pytest.raises(ModelError, match="its transformer has no weights"):
        rc.compile(pipeline, call=CALL, num_steps=STEPS, budgets=(BUDGET,), runtime="eager")
    pipeline.transformer = FLUX.make().transformer
    assert torch.equal(draw(pipeline, CALL, STEPS), full)
    with pytest.raises(ModelError, match="budget 3: FluxPipeline has its own transformer again"):
        draw(pipeline, CALL, STEPS, budget=BUDGET)


def test_components_that_the_pipeline_does_not_have_are_refused() -> None:
    with pytest.raises(ModelError, match="FluxPipeline: has no component unet"):
        rc.accelerate(FLUX.make(), {"unet": family("flux").parts["transformer"]})


@pytest.mark.parametrize(
    ("pipeline", "compiled", "message"),
    [
        (None, None, "accelerate: expected a pipeline of diffusers, got None; load it first"),
        ("some/model", None, "accelerate: expected a pipeline of diffusers, got 'some/model'; load it first"),
        (FLUX.make(), "folder", "accelerate: expected what rc.compile or rc.load returned, got 'folder'"),
        (FLUX.make(), {"transformer": 3}, "accelerate: expected what rc.compile or rc.load returned, got 3"),
        (FLUX.make(), {}, "accelerate: no compiled transformer is given"),
    ],
)
def test_what_cannot_be_accelerated_is_refused(pipeline: Any, compiled: Any, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        rc.accelerate(pipeline, compiled)


def test_engines_of_another_component_or_model_are_refused() -> None:
    engines = family("flux").parts["transformer"]
    wan = TINY["wan-2.2"].make()
    with pytest.raises(ModelError, match=r"compiled for a transformer, not for its transformer_2; .*component='transf"):
        rc.accelerate(wan, {"transformer_2": engines})
    with pytest.raises(ModelError, match="its transformer is a WanTransformer3DModel, the engines are those of a Flux"):
        rc.accelerate(wan, engines)
    assert isinstance(wan.transformer, diffusers.WanTransformer3DModel)


@pytest.mark.parametrize("budget", [[3], 3.0, "3"])
def test_budgets_of_another_kind_are_refused(budget: Any) -> None:
    pipeline = family("flux").pipeline()
    with pytest.raises(DispatchError, match="a budget is a whole number of steps from 1 on, or a share of them"):
        draw(pipeline, CALL, STEPS, budget=budget)


@pytest.mark.parametrize("call", [[], "a cat", [3]])
def test_calls_of_another_kind_are_refused(call: Any) -> None:
    with pytest.raises(ModelError, match="expected the arguments of a pipeline call"):
        rc.compile(FLUX.make(), call=call, budgets=(2,), num_steps=4)
