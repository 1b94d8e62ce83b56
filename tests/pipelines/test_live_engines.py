"""One compilation serves loops of any length, at any budget, and several requests."""

from collections.abc import Iterator
from typing import Any

import diffusers
import pytest
import torch

import recache_compile as rc
from recache_compile.errors import DispatchError
from recache_compile.passes.map_requests import map_over_requests
from recache_compile.policies.base import Problem
from recache_compile.policies.uniform import Uniform
from tests.families import BUDGET, DIFFERENT, EXACT, QUICK, SAME, STEPS, TINY, Family, error, family, plain
from tests.tiny_pipelines import FLOW_HEUN, draw

EVERY = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in TINY]
)
OTHERS = (3, 13)
"""Lengths of loops that were not compiled."""


SLOWER = ("cogvideox",)
"""Others whose recompute program is mapped over requests: it writes to parts of tensors."""


@pytest.fixture(autouse=True)
def _quiet_schedulers() -> Iterator[None]:
    """Schedulers log what they cannot use of another one's configuration."""
    diffusers.utils.logging.set_verbosity_error()
    yield
    diffusers.utils.logging.set_verbosity_warning()


def branches(this: Family, name: str) -> int:
    """Guidance branches of a generation, by the prologues of a usual one."""
    for calls in this.calls.values():
        calls.clear()
    draw(this.pipeline(), TINY[name].call(0), STEPS)
    return sum(calls["prologue"] for calls in this.calls.values())


@EVERY
def test_full_budget_equals_the_plain_pipeline_at_any_number_of_steps(name: str) -> None:
    tiny, this = TINY[name], family(name)
    pipeline, usual = this.pipeline(1.0), branches(this, name)
    for steps in (*OTHERS, STEPS, OTHERS[0]):
        for calls in this.calls.values():
            calls.clear()
        assert error(draw(pipeline, tiny.call(0), steps), plain(tiny, tiny.call(0), num_steps=steps)) <= EXACT
        assert sum(calls["prologue"] for calls in this.calls.values()) <= usual


@EVERY
def test_a_budget_costs_what_it_says_at_any_number_of_steps(name: str) -> None:
    tiny, this = TINY[name], family(name)
    pipeline = this.pipeline(BUDGET)
    full = plain(tiny, tiny.call(0), num_steps=OTHERS[1])
    this.recomputed()
    first = draw(pipeline, tiny.call(0), OTHERS[1])
    recomputed = sum(this.recomputed().values())
    assert error(first, full) >= DIFFERENT
    assert error(draw(pipeline, tiny.call(0), OTHERS[1]), first) <= SAME
    this.recomputed()
    draw(pipeline, tiny.call(0), STEPS)
    if len(this.parts) == 1:  # two transformers begin where the noise level says
        assert recomputed == sum(this.recomputed().values())


def test_budgets_may_be_shares() -> None:
    this = family("flux")
    pipeline = this.pipeline(0.25)
    for steps, expected in ((STEPS, 2), (13, 3), (3, 1), (1, 1)):
        this.recomputed()
        draw(pipeline, this.tiny.call(0), steps)
        assert this.recomputed() == {"transformer": expected}
    this.recomputed()
    draw(pipeline, this.tiny.call(0), 10, budget=0.5)
    assert this.recomputed() == {"transformer": 5}


def test_budgets_that_were_not_compiled_are_asked_of_the_policy() -> None:
    this = family("flux")
    compiled = this.parts["transformer"]
    for budget in range(1, STEPS + 1):
        assert compiled.planner.plan(budget).schedule == Uniform().schedule(Problem(STEPS), budget)
        this.recomputed()
        draw(this.pipeline(budget), this.tiny.call(0), STEPS)
        assert this.recomputed() == {"transformer": budget}
    assert compiled.planner.plan(4, 30).schedule == Uniform().schedule(Problem(30), 4)


def test_a_larger_budget_than_steps_recomputes_all_of_them() -> None:
    this = family("flux")
    assert error(
        draw(this.pipeline(STEPS), this.tiny.call(0), 3), plain(this.tiny, this.tiny.call(0), num_steps=3)
    ) <= (EXACT)


def test_schedules_that_were_given_are_carried_over_and_no_others_are_made() -> None:
    this = family("flux")
    compiled = this.parts["transformer"]
    given = compiled.engines.with_plans({2: rc.Schedule((0, 4), STEPS)}, compiled.forecaster)
    pipeline = rc.accelerate(this.tiny.make(), given)
    this.recomputed()
    draw(pipeline, this.tiny.call(0), 16)
    assert this.recomputed() == {"transformer": 2}
    with pytest.raises(DispatchError, match="budget 3 was not compiled; there are 2, whose schedules were given"):
        draw(pipeline, this.tiny.call(0), STEPS, budget=3)
    with pytest.raises(DispatchError, match="budget 3 was not compiled; there are 2, whose schedules were given"):
        draw(pipeline, this.tiny.call(0), 16, budget=3)


def test_a_scheduler_with_more_calls_than_steps() -> None:
    """One of second order: the loop has 2 T - 1 calls of the transformer."""
    this, tiny = family("sd3"), TINY["sd3"]
    pipeline = this.pipeline(1.0)

    def change(pipeline: Any) -> None:
        pipeline.scheduler = FLOW_HEUN(pipeline.scheduler.config)

    change(pipeline)
    for steps in (STEPS, 5):
        expected = plain(tiny, tiny.call(0), change, num_steps=steps)
        assert error(draw(pipeline, tiny.call(0), steps), expected) <= EXACT
        this.recomputed()
        draw(pipeline, tiny.call(0), steps, budget=4)
        assert this.recomputed() == {"transformer": 4}


def test_custom_sigmas_of_another_length() -> None:
    this, tiny = family("flux"), TINY["flux"]
    pipeline = this.pipeline(1.0)
    sigmas = [(1 - step / 5) ** 1.5 for step in range(5)]
    for options in ({"sigmas": sigmas}, {}, {"sigmas": sigmas[:3]}):
        expected = plain(tiny, tiny.call(0), **options)
        assert error(draw(pipeline, tiny.call(0), STEPS, **options), expected) <= EXACT


@pytest.mark.parametrize("name", ["flux", "sd3", "wan-2.1", *(pytest.param(x, marks=pytest.mark.slow) for x in SLOWER)])
def test_recompute_programs_serve_several_requests(name: str) -> None:
    """Each row is what the program for one request gives."""
    one = family(name).parts["transformer"].variants[0].programs["recompute"]
    many = map_over_requests(one)
    generator = torch.Generator().manual_seed(0)
    given = [torch.randn(4, *value.shape, generator=generator).to(value.dtype) for value in one.inputs]  # type: ignore[arg-type]
    results = many.module(*given)
    for row in range(4):
        for ours, alone in zip(results, one.module(*(value[row] for value in given)), strict=True):
            assert error(ours[row], alone) <= EXACT
    assert many.weights.keys() == one.weights.keys()
