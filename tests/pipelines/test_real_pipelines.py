"""Real pipelines of `diffusers`, small ones with random weights, on compiled engines.

What is expected comes from the pipeline itself, running its own transformer.
"""

import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from PIL import Image
from torch import Tensor

import recache_compile as rc
from recache_compile.pipelines.record import record_examples
from tests.families import (
    BATCHED,
    BUDGET,
    DIFFERENT,
    EXACT,
    QUICK,
    SAME,
    STEPS,
    TALL,
    TINY,
    compile_tiny,
    error,
    expected_recomputes,
    family,
    plain,
)
from tests.tiny_pipelines import NEGATIVE, draw, stack

EVERY = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in TINY]
)
IMG2IMG = pytest.mark.parametrize(("name", "source"), [("flux-img2img", "flux"), ("sd3-img2img", "sd3")])
STRENGTHS = (0.13, 0.3, 0.6, 1.0)


# every pipeline


@EVERY
def test_full_budget_equals_the_plain_pipeline_and_prompts_do_not_leak(name: str) -> None:
    tiny, pipeline = TINY[name], family(name).pipeline()
    first, second, third = (draw(pipeline, tiny.call(n), STEPS) for n in (0, 1, 0))
    assert error(first, plain(tiny, tiny.call(0))) <= EXACT
    assert error(second, plain(tiny, tiny.call(1))) <= EXACT
    assert error(third, first) <= SAME
    assert error(second, first) >= DIFFERENT


@EVERY
def test_without_guidance_full_budget_equals_the_plain_pipeline(name: str) -> None:
    tiny, pipeline = TINY[name], family(name).pipeline()
    assert tiny.unguided is not None
    draw(pipeline, tiny.call(0), STEPS)
    for n in (0, 1):
        assert error(draw(pipeline, tiny.unguided(n), STEPS), plain(tiny, tiny.unguided(n))) <= EXACT


@EVERY
def test_small_budget_differs_and_is_reproducible(name: str) -> None:
    tiny, pipeline = TINY[name], family(name).pipeline(BUDGET)
    first, second, third = (draw(pipeline, tiny.call(n), STEPS) for n in (0, 1, 0))
    assert error(third, first) <= SAME
    assert error(draw(family(name).pipeline(BUDGET), tiny.call(1), STEPS), second) <= SAME
    full = draw(pipeline, tiny.call(0), STEPS, budget=STEPS)
    assert error(full, plain(tiny, tiny.call(0))) <= EXACT
    assert error(first, full) >= DIFFERENT


@EVERY
def test_recompute_engines_run_in_recompute_steps_and_no_others(name: str) -> None:
    this = family(name)
    pipeline = this.pipeline(BUDGET)
    expected = expected_recomputes(this.tiny, this.tiny.call(0), this.recompute_steps)
    this.recomputed()
    for _ in range(2):
        draw(pipeline, this.tiny.call(0), STEPS)
        assert this.recomputed() == expected


@pytest.mark.parametrize(("name", "branches"), [("flux", 1), ("sd3", 1), ("wan-2.1", 2), ("qwen-image", 2)])
def test_every_branch_is_recomputed_k_times(name: str, branches: int) -> None:
    this = family(name)
    this.recomputed()
    draw(this.pipeline(BUDGET), this.tiny.call(0), STEPS)
    calls = this.calls["transformer"]
    assert calls["recompute"] == branches * BUDGET
    assert calls["prologue"] == branches
    gaps = sum(step + 1 < STEPS and step + 1 not in this.recompute_steps for step in this.recompute_steps)
    assert calls.total() == branches * (BUDGET + gaps + 1)


# starts in the middle of the schedule; image to image has the same transformer as text to image


@IMG2IMG
def test_full_budget_equals_the_plain_pipeline_at_every_strength(name: str, source: str) -> None:
    tiny, pipeline = TINY[name], family(source).pipeline(tiny=TINY[name])
    for strength in (*STRENGTHS, STRENGTHS[0]):
        call = tiny.call(0) | {"strength": strength}
        assert error(draw(pipeline, call, STEPS), plain(tiny, call)) <= EXACT


@pytest.mark.parametrize("strength", STRENGTHS)
@IMG2IMG
def test_the_first_step_is_recomputed_and_those_of_the_schedule_after_it(
    name: str, source: str, strength: float
) -> None:
    this, tiny, call = family(source), TINY[name], TINY[name].call(0) | {"strength": strength}
    start = STEPS - max(1, int(STEPS * strength))
    expected = {"transformer": 1 + sum(step > start for step in this.recompute_steps)}
    assert expected_recomputes(tiny, call, this.recompute_steps) == expected
    pipeline = this.pipeline(BUDGET, tiny)
    this.recomputed()
    first = draw(pipeline, call, STEPS)
    assert this.recomputed() == expected
    draw(pipeline, call | {"strength": 0.9}, STEPS)
    assert error(draw(pipeline, call, STEPS), first) <= SAME


def test_a_pipeline_that_does_not_tell_its_scheduler_where_it_begins() -> None:
    this = family("wan-2.1")

    def make() -> Any:
        parts = this.tiny.make().components
        names = ("tokenizer", "text_encoder", "transformer", "vae", "scheduler")
        pipeline = diffusers.WanVideoToVideoPipeline(**{name: parts[name] for name in names})
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    frames = [Image.new("RGB", (32, 32), (40 * n, 20, 200)) for n in range(5)]
    call = this.tiny.call(0) | {"video": frames, "strength": 0.5}
    del call["num_frames"]
    pipeline = rc.accelerate(make(), this.parts, budget=STEPS)
    assert error(draw(pipeline, call, STEPS), draw(make(), call, STEPS)) <= EXACT
    this.recomputed()
    draw(pipeline, call, STEPS, budget=BUDGET)
    assert this.recomputed() == {"transformer": 2 * (1 + sum(step > STEPS // 2 for step in this.recompute_steps))}


@pytest.mark.slow
@pytest.mark.parametrize("boundary", [0.95, 0.875, 0.7])
def test_the_second_transformer_begins_with_a_recompute_step(boundary: float) -> None:
    this = family("wan-2.2")

    def move(pipeline: Any) -> None:
        pipeline.register_to_config(boundary_ratio=boundary)

    pipeline, call = this.pipeline(BUDGET), this.tiny.call(0)
    move(pipeline)
    pipeline.scheduler.set_timesteps(STEPS)
    switch = int((pipeline.scheduler.timesteps >= boundary * 1000).sum())
    assert 0 < switch < STEPS
    this.recomputed()
    draw(pipeline, call, STEPS)
    schedule = this.recompute_steps
    assert this.recomputed() == {
        "transformer": 2 * sum(step < switch for step in schedule),
        "transformer_2": 2 * (1 + sum(step > switch for step in schedule)),
    }
    assert error(draw(pipeline, call, STEPS, budget=STEPS), plain(this.tiny, call, move)) <= EXACT


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:schedules stay uniform")
def test_one_line_accelerates_both_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RECACHE_CACHE", str(tmp_path))
    tiny = TINY["wan-2.2"]
    call, drawn, kept = tiny.call(0), [], set()
    for _ in range(2):
        pipeline = tiny.make()
        rc.accelerate(pipeline, budget=STEPS - 1, num_steps=STEPS, call=call, runtime="eager")
        drawn.append(draw(pipeline, call, STEPS))
        kept.add(len(list((tmp_path / "programs").iterdir())))
    assert len(kept) == 1
    assert error(drawn[1], drawn[0]) <= SAME
    assert error(draw(rc.restore(pipeline), call, STEPS), plain(tiny, call)) <= SAME


# guidance branches


def test_true_cfg_of_flux() -> None:
    this = family("flux")
    call, pipeline = this.tiny.call(0) | {"true_cfg_scale": 3.0}, this.pipeline()
    assert error(draw(pipeline, call, STEPS), plain(this.tiny, call)) <= EXACT
    this.recomputed()
    small = draw(pipeline, call, STEPS, budget=BUDGET)
    assert this.recomputed() == {"transformer": 2 * BUDGET}
    assert error(draw(pipeline, call, STEPS, budget=BUDGET), small) <= SAME


def test_branches_without_a_name_equal_the_plain_pipeline() -> None:
    tiny, pipeline = TINY["flux-img2img"], family("flux").pipeline(tiny=TINY["flux-img2img"])
    for strength, n in itertools.product((1.0, 0.6), (0, 1)):
        call = tiny.call(n) | {"true_cfg_scale": 3.0, "strength": strength}
        assert error(draw(pipeline, call, STEPS), plain(tiny, call)) <= EXACT


def test_the_same_prompt_in_two_branches_without_a_name() -> None:
    this, tiny = family("flux"), TINY["flux-img2img"]
    call = tiny.call(NEGATIVE) | {"strength": 1.0}
    assert torch.equal(call["prompt_embeds"], call["negative_prompt_embeds"])
    pipeline = this.pipeline(BUDGET, tiny)
    one_branch = draw(pipeline, call, STEPS)
    this.recomputed()
    assert error(draw(pipeline, call | {"true_cfg_scale": 3.0}, STEPS), one_branch) <= EXACT
    assert this.recomputed() == {"transformer": 2 * BUDGET}


def flux_loop(pipeline: Any, branches: Mapping[str, Mapping[str, Any]], order: Callable[[int], list[str]]) -> Tensor:
    """A denoising loop that calls the transformer once for each branch; names them unless they begin with "_"."""
    latents = next(iter(branches.values()))["hidden_states"]
    pipeline.scheduler.set_timesteps(STEPS, mu=1.0)
    pipeline.scheduler.set_begin_index(0)
    for step, timestep in enumerate(pipeline.scheduler.timesteps):
        predictions = {}
        for name in order(step):
            inputs = {**branches[name], "hidden_states": latents, "timestep": timestep[None] / 1000}
            if name.startswith("_"):
                predictions[name] = pipeline.transformer(**inputs)[0]
            else:
                with pipeline.transformer.cache_context(name):
                    predictions[name] = pipeline.transformer(**inputs)[0]
        difference = predictions[min(branches)] - predictions[max(branches)]
        latents = pipeline.scheduler.step(3 * difference, timestep, latents, return_dict=False)[0]
    return latents


def test_branches_without_a_name_are_known_by_their_conditioning_and_not_by_their_order() -> None:
    this = family("flux")
    inputs = [dict(record_examples(this.tiny.make(), STEPS, this.tiny.call(n))[0].inputs) for n in (0, 1)]
    named = dict(zip(("cond", "uncond"), inputs, strict=True))
    unnamed = dict(zip(("_cond", "_uncond"), inputs, strict=True))
    expected = flux_loop(this.pipeline(BUDGET), named, lambda step: list(named))
    for order in (lambda step: list(unnamed), lambda step: sorted(unnamed, reverse=bool(step % 2))):
        assert error(flux_loop(this.pipeline(BUDGET), unnamed, order), expected) <= SAME


@pytest.mark.parametrize("name", ["sd3", "wan-2.1"])
def test_conditioning_that_a_callback_changes_is_noticed(name: str) -> None:
    tiny = TINY[name]
    batch = 2 if name == "sd3" else 1

    def change_prompt(pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        other = tiny.call(5)["prompt_embeds"].repeat(batch, 1, 1)
        return {"prompt_embeds": other if step == 3 else tensors["prompt_embeds"]}

    options = {
        "callback_on_step_end": change_prompt,
        "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"],
    }
    expected = plain(tiny, tiny.call(0), **options)
    assert error(expected, plain(tiny, tiny.call(0))) >= DIFFERENT
    assert error(draw(family(name).pipeline(), tiny.call(0), STEPS, **options), expected) <= EXACT


# several kinds of calls in one artifact


@pytest.mark.parametrize("name", BATCHED)
def test_a_batch_of_prompts(name: str) -> None:
    tiny, pipeline = TINY[name], family(name).pipeline()
    one, two = tiny.call(0), stack(tiny.call(0), tiny.call(1))
    for call in (two, one, two):
        assert error(draw(pipeline, call, STEPS), plain(tiny, call)) <= EXACT


@pytest.mark.parametrize("name", QUICK)
def test_variants_share_their_weights(name: str) -> None:
    this = family(name)
    compiled = this.parts["transformer"]
    assert len(compiled.variants) >= 2
    places = {weight: tensor.data_ptr() for weight, tensor in compiled.weights.items()}
    for program in (program for variant in compiled.variants for program in variant.programs.values()):
        assert {weight: tensor.data_ptr() for weight, tensor in program.weights.items()}.items() <= places.items()
    module = this.tiny.make().transformer
    own = {weight for weight, _ in (*module.named_parameters(), *module.named_buffers())}
    assert {weight for weight in compiled.weights if not weight.startswith("constant_")} <= own


def test_several_sizes() -> None:
    tiny, pipeline = TINY["flux"], family("flux").pipeline()
    for size in (TALL, {}, TALL):
        call = tiny.call(0) | size
        assert error(draw(pipeline, call, STEPS), plain(tiny, call)) <= EXACT


# branches that begin later than the generation


def test_guidance_that_a_callback_switches_off() -> None:
    tiny = TINY["sd3"]
    names = ["latents", "prompt_embeds", "pooled_prompt_embeds"]

    def switch_off(pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step != 3:
            return tensors
        pipeline._guidance_scale = 0.0
        return {name: tensor if name == "latents" else tensor.chunk(2)[-1] for name, tensor in tensors.items()}

    options = {"callback_on_step_end": switch_off, "callback_on_step_end_tensor_inputs": names}
    expected = plain(tiny, tiny.call(0), **options)
    assert error(draw(family("sd3").pipeline(), tiny.call(0), STEPS, **options), expected) <= EXACT


@pytest.mark.slow
def test_skip_layer_guidance() -> None:
    tiny = TINY["sd3"]
    call = tiny.call(0) | {"skip_guidance_layers": [1], "skip_layer_guidance_stop": 0.6}
    compiled = compile_tiny(tiny, call, budgets=(STEPS,))
    assert len(compiled.variants) == 2
    pipeline = rc.accelerate(tiny.make(), compiled, budget=STEPS)
    assert error(draw(pipeline, call, STEPS), plain(tiny, call)) <= EXACT
