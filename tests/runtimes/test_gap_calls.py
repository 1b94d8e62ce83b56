"""One engine call per gap: what was made ahead is exact, and dropped when it is stale."""

from typing import Any

import pytest
import torch

import recache_compile as rc
from recache_compile.runtimes.dispatcher import Dispatcher
from tests.compiler.test_build import LATENTS, counted, relative_error
from tests.conftest import NUM_STEPS, compile_flux, flux_inputs, loop_inputs, tiny_flux
from tests.reference import CachedReference

STEPS = (0, 4, 8)


def run_on(run: Dispatcher, inputs: dict[str, Any], steps: range) -> list[torch.Tensor]:
    return [run(step=step, **loop_inputs(step, inputs))[0] for step in steps]


@pytest.mark.parametrize("budget", [1, 2, 3, 6, 11, 12])
def test_a_generation_makes_two_calls_for_each_recompute_step_and_a_prologue_at_most(
    budget: int, eager: rc.Compiled
) -> None:
    schedule = rc.Schedule((*tuple(range(budget - 1)), NUM_STEPS - 1) if budget > 1 else (0,), NUM_STEPS)
    compiled, calls = counted(eager.engines.with_plans({budget: schedule}, eager.forecaster))
    run_on(compiled.dispatcher(budget), flux_inputs(), range(NUM_STEPS))
    assert calls.total() <= 2 * budget + 1


def test_conditioning_that_changes_in_a_gap_drops_what_was_made_ahead(
    eager: rc.Compiled, flux: torch.nn.Module
) -> None:
    compiled, calls = counted(eager)
    run, inputs = compiled.dispatcher(budget=3), flux_inputs()
    reference = CachedReference(flux, inputs, LATENTS, STEPS)
    run_on(run, inputs, range(2))
    assert calls["forecast"] == 1
    for step in range(2):
        reference(step, **loop_inputs(step, inputs))
    stale = reference(2, **loop_inputs(2, inputs))[0]
    inputs["pooled_projections"] = inputs["pooled_projections"] + 1
    changed = run_on(run, inputs, range(2, 4))
    assert calls["forecast"] == 2
    assert calls["prologue"] == 2
    assert relative_error(changed[0], stale) > 1e-4
    for step, result in enumerate(changed, 2):
        assert relative_error(result, reference(step, **loop_inputs(step, inputs))[0]) <= 1e-4


def test_other_weights_in_a_gap_drop_what_was_made_ahead() -> None:
    """The module shares its weights with the engines: the reference sees the new ones too."""
    flux = tiny_flux()
    compiled, calls = counted(compile_flux(flux, budgets=(3,)))
    run, inputs = compiled.dispatcher(budget=3), flux_inputs()
    reference = CachedReference(flux, inputs, LATENTS, STEPS)
    run_on(run, inputs, range(2))
    for step in range(2):
        reference(step, **loop_inputs(step, inputs))
    stale = reference(2, **loop_inputs(2, inputs))[0]
    compiled.refit({name: 2 * value for name, value in flux.state_dict().items()})
    changed = run_on(run, inputs, range(2, 4))
    assert calls["forecast"] == 2
    assert relative_error(changed[0], stale) > 1e-4
    for step, result in enumerate(changed, 2):
        assert relative_error(result, reference(step, **loop_inputs(step, inputs))[0]) <= 1e-4


def test_a_result_may_be_written_to(eager: rc.Compiled, flux: torch.nn.Module) -> None:
    run = eager.dispatcher(budget=3)
    reference = CachedReference(flux, flux_inputs(), LATENTS, STEPS)
    for step in range(NUM_STEPS):
        given = loop_inputs(step, flux_inputs())
        (result,) = run(step=step, **given)
        assert relative_error(result, reference(step, **given)[0]) <= 1e-4
        result.fill_(float("nan"))


def test_an_interrupted_gap_is_made_again(eager: rc.Compiled) -> None:
    compiled, calls = counted(eager)
    run = compiled.dispatcher(budget=3)
    first = run_on(run, flux_inputs(), range(2))
    again = run_on(run, flux_inputs(), range(NUM_STEPS))
    assert torch.equal(first[1], again[1])
    assert calls["forecast"] == 4
