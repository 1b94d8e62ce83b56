from itertools import combinations

import numpy as np
import pytest

from recache_compile.errors import ScheduleError
from recache_compile.ir.forecasters import Forecaster, Newton, Reuse, Taylor
from recache_compile.ir.schedule import Schedule
from recache_compile.policies.base import Problem
from recache_compile.policies.front_loaded import FrontLoaded
from recache_compile.policies.gram import Gram
from recache_compile.policies.moves import relocations
from recache_compile.policies.surrogate import Surrogate
from recache_compile.policies.uniform import Uniform
from tests.policies.fakes import calibration_of, trajectories


def problem_of(total: int, forecaster: Forecaster, seed: int = 0) -> Problem:
    return Problem(total, forecaster, calibration_of(trajectories(total, seed=seed)))


def errors(problem: Problem, schedules: list[Schedule]) -> np.ndarray:
    return Surrogate(problem.need_calibration("test"), problem.need_forecaster("test")).errors(schedules)


@pytest.mark.parametrize("forecaster", [Reuse(), Taylor(1), Taylor(2), Newton(1)])
@pytest.mark.parametrize("budget", [2, 4, 6])
def test_the_best_of_all_is_found_in_short_loops(forecaster: Forecaster, budget: int) -> None:
    problem = problem_of(10, forecaster)
    every = [Schedule((0, *rest), 10) for rest in combinations(range(1, 10), budget - 1)]
    found = Gram().schedule(problem, budget)
    assert errors(problem, [found])[0] == pytest.approx(errors(problem, every).min(), rel=1e-9)


@pytest.mark.parametrize("seed", range(2))
def test_no_move_is_better_than_any_minimum_of_a_long_loop(seed: int) -> None:
    problem = problem_of(30, Taylor(1), seed)
    minima = Gram(starts=2).minima(problem, 7)
    for schedule, value in minima:
        assert schedule.budget == 7
        assert errors(problem, [schedule])[0] == pytest.approx(value, rel=1e-12)
        assert (errors(problem, relocations(schedule)) >= value).all()
    values = [value for _, value in minima]
    assert values == sorted(values)
    assert len({schedule for schedule, _ in minima}) == len(minima)


@pytest.mark.parametrize("seed", range(3))
def test_never_worse_than_the_simple_rules(seed: int) -> None:
    problem = problem_of(25, Taylor(1), seed)
    found = Gram(starts=0).schedule(problem, 6)
    simple = [Uniform().schedule(problem, 6), FrontLoaded().schedule(problem, 6)]
    assert errors(problem, [found])[0] <= errors(problem, simple).min()


def test_the_same_problem_has_the_same_answer() -> None:
    first, second = (Gram().minima(problem_of(20, Taylor(1)), 5) for _ in range(2))
    assert first == second


@pytest.mark.parametrize("budget", [1, 2, 11, 12])
def test_the_smallest_and_largest_budgets_are_met(budget: int) -> None:
    assert Gram().schedule(problem_of(12, Taylor(1)), budget).budget == budget


def test_what_is_missing_is_named() -> None:
    with pytest.raises(ScheduleError, match="policy gram: needs a few uncached generations"):
        Gram().schedule(Problem(12, Taylor(1)), 4)
    with pytest.raises(ScheduleError, match="policy gram: needs a forecaster"):
        Gram().schedule(Problem(12, calibration=calibration_of(trajectories(12))), 4)
