"""Generations that run at the same time, inside one another, or in a loop of their own."""

import copy
import gc
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

import recache_compile as rc
from recache_compile.pipelines.record import record_examples
from tests.families import BUDGET, EXACT, SAME, STEPS, TINY, error, family, plain
from tests.tiny_pipelines import draw

FLUX = TINY["flux"]
CALL = FLUX.call(0)
PROMPTS = 4


def with_own_scheduler(pipeline: Any) -> Any:
    """A shallow copy: the same engines, as servers use it."""
    other = copy.copy(pipeline)
    other.scheduler = copy.deepcopy(pipeline.scheduler)
    return other


def test_shallow_copies_in_threads_draw_what_each_draws_alone() -> None:
    pipeline = family("flux").pipeline(BUDGET)
    budgets = [BUDGET, STEPS, BUDGET, STEPS]
    alone = [draw(pipeline, FLUX.call(n), STEPS, budget=budgets[n]) for n in range(PROMPTS)]
    family("flux").recomputed()

    def one(n: int) -> Tensor:
        return draw(with_own_scheduler(pipeline), FLUX.call(n), STEPS, budget=budgets[n])

    with ThreadPoolExecutor(PROMPTS) as pool:
        found = list(pool.map(one, [*range(PROMPTS)] * 6))
    assert max(error(each, alone[number % PROMPTS]) for number, each in enumerate(found)) <= SAME
    assert family("flux").recomputed() == {"transformer": 6 * sum(budgets)}


@pytest.mark.parametrize("budget", [BUDGET, STEPS])
def test_a_generation_inside_the_callback_of_another(budget: int) -> None:
    pipeline = family("flux").pipeline(BUDGET)
    other = with_own_scheduler(pipeline)
    outer, inner = draw(pipeline, CALL, STEPS), draw(other, FLUX.call(1), STEPS, budget=budget)
    found: list[Tensor] = []

    def nested(this: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step in (2, 5):
            found.append(draw(other, FLUX.call(1), STEPS, budget=budget))
        return tensors

    assert error(draw(pipeline, CALL, STEPS, callback_on_step_end=nested), outer) <= SAME
    assert [error(each, inner) <= SAME for each in found] == [True, True]


@pytest.mark.parametrize("used", [False, True])
def test_a_pipeline_made_of_the_components_of_another_is_accelerated_too(used: bool) -> None:
    first = family("flux").pipeline()
    second = diffusers.FluxPipeline(**first.components | {"scheduler": copy.deepcopy(first.scheduler)})
    second.set_progress_bar_config(disable=True)
    if used:
        draw(first, FLUX.call(1), STEPS)
    for _ in range(2):
        assert error(draw(second, CALL, STEPS), plain(FLUX, CALL)) <= EXACT
    rc.accelerate(second, family("flux").parts, budget=STEPS)
    assert error(draw(second, CALL, STEPS), plain(FLUX, CALL)) <= EXACT


def test_a_loop_of_its_own_that_never_steps_the_scheduler() -> None:
    """Two prompts in each step, as editing by flows does it; nothing of an earlier loop is kept."""
    pipeline = family("flux").pipeline(BUDGET)
    prompts = [dict(record_examples(FLUX.make(), STEPS, FLUX.call(n))[0].inputs) for n in (0, 1)]
    family("flux").recomputed()
    alive = []
    for _ in range(3):
        pipeline.scheduler.set_timesteps(sigmas=[1 - step / STEPS for step in range(STEPS)], mu=1.0)
        latents = prompts[0]["hidden_states"]
        for timestep in pipeline.scheduler.timesteps:
            now = {"hidden_states": latents, "timestep": timestep[None] / 1000, "return_dict": False}
            one, other = (pipeline.transformer(**prompt | now)[0] for prompt in prompts)
            latents = latents + (other - one) / STEPS
        assert family("flux").recomputed() == {"transformer": 2 * BUDGET}
        gc.collect()
        alive.append(sum(issubclass(type(each), Tensor) for each in gc.get_objects()))
    assert alive[-1] <= alive[0] + 20


def without_guidance_for_some_steps(pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    pipeline._guidance_scale = 1.0 if 1 <= step < 4 else 4.0
    return tensors


def test_a_branch_that_is_left_out_for_some_steps_begins_anew() -> None:
    this = family("wan-2.1")
    call = this.tiny.call(0)
    options = {"callback_on_step_end": without_guidance_for_some_steps}
    expected = plain(this.tiny, call, **options)
    assert error(expected, plain(this.tiny, call)) > 100 * EXACT
    assert error(draw(this.pipeline(), call, STEPS, **options), expected) <= EXACT
    this.recomputed()
    small = draw(this.pipeline(BUDGET), call, STEPS, **options)
    assert torch.isfinite(small).all()
    anew = [step for step in this.recompute_steps if step < 2 or step > 5] + [5]  # it is away from step 2 to 4
    assert this.recomputed() == {"transformer": BUDGET + len(anew)}
