"""Real pipelines with other schedulers and other timesteps than their own."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import diffusers
import pytest
import torch

import recache_compile as rc
from recache_compile.errors import MismatchError
from recache_compile.pipelines.record import record_examples
from tests.families import BUDGET, EXACT, QUICK, STEPS, TINY, compile_tiny, error, family, plain
from tests.tiny_pipelines import FLOW_HEUN, HEUN, draw

ONE_CALL_A_STEP = [
    pytest.param(name, number, marks=() if name in QUICK else pytest.mark.slow)
    for name, tiny in TINY.items()
    for number, make in enumerate(tiny.schedulers)
    if make not in (FLOW_HEUN, HEUN)
]


@pytest.fixture(autouse=True)
def _quiet_schedulers() -> Iterator[None]:
    """Schedulers log what they cannot use of another one's configuration."""
    diffusers.utils.logging.set_verbosity_error()
    yield
    diffusers.utils.logging.set_verbosity_warning()


def scheduler_change(name: str, number: int) -> Callable[[Any], None]:
    def change(pipeline: Any) -> None:
        pipeline.scheduler = TINY[name].schedulers[number](pipeline.scheduler.config)

    return change


def timesteps_type(pipeline: Any, call: Mapping[str, Any]) -> str:
    """Element type of the timesteps that the pipeline gives its transformer."""
    (example, *_) = record_examples(pipeline, STEPS, call)
    return str(example.inputs["timestep"].dtype).removeprefix("torch.")


@pytest.mark.parametrize(("name", "number"), ONE_CALL_A_STEP)
def test_another_scheduler_than_compiled(name: str, number: int) -> None:
    """Other timesteps are noticed; of another type, they are refused or left to the original."""
    tiny, pipeline, change = TINY[name], family(name).pipeline(), scheduler_change(name, number)
    call, changed = tiny.call(0), tiny.make()
    change(changed)
    ours, theirs = timesteps_type(changed, call), timesteps_type(tiny.make(), call)
    expected = plain(tiny, call, change)
    draw(pipeline, call, STEPS)
    change(pipeline)
    if ours == theirs:
        assert error(draw(pipeline, call, STEPS), expected) <= EXACT
        draw(pipeline, call, STEPS, budget=BUDGET)
        assert error(draw(pipeline, call, STEPS), expected) <= EXACT
        return
    message = rf"timestep is {ours}\[\d\], compiled {theirs}\[\d\]"
    with pytest.raises(MismatchError, match=message):
        draw(pipeline, call, STEPS)
    pipeline = family(name).pipeline(fallback="eager")
    change(pipeline)
    with pytest.warns(UserWarning, match=message):
        assert torch.equal(draw(pipeline, call, STEPS), expected)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "numbers"), [("sd3", (0, 1)), ("wan-2.1", (1,))])
def test_compiled_for_timesteps_of_another_type(name: str, numbers: tuple[int, ...]) -> None:
    tiny, call = TINY[name], TINY[name].call(0)
    compiled = compile_tiny(tiny, call, scheduler_change(name, numbers[0]), budgets=(STEPS,))
    for number in numbers:
        pipeline = tiny.make()
        scheduler_change(name, number)(pipeline)
        rc.accelerate(pipeline, compiled, budget=STEPS)
        assert error(draw(pipeline, call, STEPS), plain(tiny, call, scheduler_change(name, number))) <= EXACT


@pytest.mark.slow
@pytest.mark.parametrize(("name", "number"), [("sd3", 2), ("pixart-sigma", 2)])
def test_two_calls_a_step(name: str, number: int) -> None:
    """A scheduler of second order: the loop has 2 T - 1 calls of the transformer."""
    tiny, call, change = TINY[name], TINY[name].call(0), scheduler_change(name, number)
    compiled = compile_tiny(tiny, call | {"num_inference_steps": STEPS}, change, num_steps=15, budgets=(15,))
    pipeline = tiny.make()
    change(pipeline)
    rc.accelerate(pipeline, compiled, budget=15)
    assert error(draw(pipeline, call, STEPS), plain(tiny, call, change)) <= EXACT


def test_other_timesteps_of_the_same_scheduler() -> None:
    tiny, pipeline = TINY["flux"], family("flux").pipeline()
    sigmas = [(1 - step / STEPS) ** 1.5 for step in range(STEPS)]
    for options in ({}, {"sigmas": sigmas}, {}):
        expected = plain(tiny, tiny.call(0), **options)
        assert error(draw(pipeline, tiny.call(0), STEPS, **options), expected) <= EXACT
