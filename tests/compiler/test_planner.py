"""Plans for budgets and loops that were not compiled, before and after an artifact is written."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import recache_compile as rc
from recache_compile.artifact.manifest import read_manifest
from recache_compile.errors import DispatchError
from recache_compile.ir.carry_over import carry_over
from recache_compile.ir.forecasters import Fitted, Taylor
from recache_compile.policies.base import Calibration, Policy, Problem
from recache_compile.policies.front_loaded import FrontLoaded
from recache_compile.policies.gram import Gram
from recache_compile.policies.recache import Logits, ReCache
from recache_compile.policies.thresholds import MagCache, TeaCache
from recache_compile.policies.uniform import Uniform
from tests.compiler.test_build import LATENTS, relative_error
from tests.conftest import NUM_STEPS, flux_inputs, loop_inputs
from tests.reference import CachedReference

LEVELS = tuple((1 - step / NUM_STEPS) ** 1.5 for step in range(NUM_STEPS))
OTHERS = tuple((1 - step / 20) ** 2.5 for step in range(20))


def calibration() -> Calibration:
    walks = np.cumsum(np.random.default_rng(0).normal(size=(2, NUM_STEPS, 30)), 1)
    grams = walks @ walks.transpose(0, 2, 1)
    steps = np.abs(np.random.default_rng(1).normal(size=NUM_STEPS))
    return Calibration(grams, grams, -np.ones(NUM_STEPS) / NUM_STEPS, steps, 1 + steps / 9)


def trained() -> ReCache:
    torch.manual_seed(0)
    return ReCache(Logits(NUM_STEPS, 4), {"schedules": {str(budget): [] for budget in range(1, NUM_STEPS + 1)}})


POLICIES: dict[str, Policy] = {
    "uniform": Uniform(),
    "uniform with options": Uniform(warmup=2),
    "front-loaded": FrontLoaded(power=2.5),
    "gram": Gram(starts=2),
    "teacache": TeaCache(),
    "magcache": MagCache(),
    "trained": trained(),
}


def planned(eager: rc.Compiled, policy: Policy, **facts: Any) -> rc.Compiled:
    """Schedules of budgets 3 and 5, at known noise levels."""
    problem = Problem(NUM_STEPS, eager.forecaster, calibration())
    schedules = {budget: policy.schedule(problem, budget) for budget in (3, 5)}
    description = replace(eager.description, levels=LEVELS)
    engines = replace(eager.engines, description=description)
    forecaster = facts.pop("forecaster", eager.forecaster)
    return engines.with_plans(schedules, forecaster, "mine", policy, calibration(), **facts)


@pytest.mark.parametrize("name", POLICIES)
def test_a_policy_is_asked_for_budgets_and_loops_that_were_not_compiled(
    name: str, eager: rc.Compiled, tmp_path: Path
) -> None:
    policy = POLICIES[name]
    compiled = planned(eager, policy)
    compiled.save(tmp_path / "artifact")
    loaded = rc.load(tmp_path / "artifact")
    problem = Problem(NUM_STEPS, eager.forecaster, calibration())
    for each in (compiled, loaded):
        assert set(each.plans) == {3, 5}
        for budget in range(2, NUM_STEPS):
            expected = policy.schedule(problem, budget)
            assert each.planner.plan(budget).schedule == expected
            if name in ("uniform", "uniform with options", "front-loaded"):
                other = policy.schedule(Problem(20), budget)
            else:
                other = carry_over(expected, budget, 20, LEVELS, OTHERS)
            assert each.planner.plan(budget, 20, OTHERS).schedule == other
    assert loaded.planner.plan(15, 20, OTHERS).schedule.budget == 15


def test_plans_are_made_once(eager: rc.Compiled) -> None:
    planner = planned(eager, Gram(starts=1)).planner
    assert planner.plan(5) is planner.plan(5, NUM_STEPS) is planner.plans[5]
    assert planner.plan(4, 20, OTHERS) is planner.plan(4, 20, OTHERS)
    assert planner.plan(0.25) is planner.plans[3]


def test_what_users_have_programmed_is_not_written(eager: rc.Compiled, tmp_path: Path) -> None:
    class Mine:
        def schedule(self, problem: Problem, budget: int) -> rc.Schedule:
            return Uniform().schedule(problem, budget)

    compiled = planned(eager, Mine())
    assert compiled.planner.plan(4).schedule.budget == 4
    compiled.save(tmp_path / "artifact")
    assert read_manifest(tmp_path / "artifact").asks is None
    loaded = rc.load(tmp_path / "artifact")
    assert loaded.planner.plan(3, 20).schedule.budget == 3
    with pytest.raises(DispatchError, match="budget 4 was not compiled; there are 3, 5, whose schedules were given"):
        loaded.planner.plan(4)


def test_fitted_forecasts_between_its_noise_levels(eager: rc.Compiled) -> None:
    fitted = Fitted(tuple(map(tuple, calibration().gram)))
    compiled = planned(eager, Uniform(), forecaster=fitted)
    plan = compiled.planner.plan(4, NUM_STEPS + 8, tuple(np.linspace(1, 0.1, NUM_STEPS + 8)))
    assert plan.forecaster != fitted
    assert isinstance(plan.forecaster, Fitted)
    assert len(plan.forecaster.gram) == NUM_STEPS + 8
    run = compiled.dispatcher_of(plan)
    for step in range(NUM_STEPS):
        run(step=step, **loop_inputs(step, flux_inputs()))


@pytest.mark.parametrize(("steps", "budget"), [(2, 1), (5, 2), (12, 4), (30, 7)])
def test_a_dispatcher_runs_a_loop_of_any_length(
    steps: int, budget: int, eager: rc.Compiled, flux: torch.nn.Module
) -> None:
    run, inputs = eager.dispatcher(budget, num_steps=steps), flux_inputs()
    schedule = run.plan.schedule
    assert (schedule.num_steps, schedule.budget) == (steps, budget)
    reference = CachedReference(flux, inputs, LATENTS, schedule.recompute_steps)
    for _ in range(2):
        for step in range(steps):
            given = loop_inputs(step % NUM_STEPS, inputs) | {"timestep": torch.tensor([1 - step / steps])}
            ours = run(step=step, **given)[0]
            assert relative_error(ours, reference(step, **given)[0]) <= 1e-4
        run.reset()
        reference = CachedReference(flux, inputs, LATENTS, schedule.recompute_steps)


def test_schedules_may_be_for_another_length_than_was_recorded(eager: rc.Compiled, tmp_path: Path) -> None:
    compiled = eager.engines.with_plans({2: rc.Schedule((0, 9), 20)}, Taylor(1))
    assert compiled.num_steps == 20
    assert compiled.planner.levels == ()
    compiled.save(tmp_path / "artifact")
    assert rc.load(tmp_path / "artifact").plans == compiled.plans
    with pytest.raises(DispatchError, match=r"expected schedules of one length, got lengths \[10, 20\]"):
        eager.engines.with_plans({2: rc.Schedule((0, 9), 20), 1: rc.Schedule((0,), 10)}, Taylor(1))


@pytest.mark.parametrize("budget", [0, -1, 1.5, 0.0, True, "5", None])
def test_budgets_that_are_none_are_refused(budget: Any, eager: rc.Compiled) -> None:
    with pytest.raises(DispatchError, match=r"budget .*: a budget is a whole number of steps from 1 on, or a share"):
        eager.dispatcher(budget)
