import pytest
from hypothesis import given
from hypothesis import strategies as st

from recache_compile.errors import ScheduleError
from recache_compile.policies.base import Problem
from recache_compile.policies.uniform import Uniform

CASES = st.integers(1, 80).flatmap(lambda total: st.tuples(st.just(total), st.integers(1, total)))


@given(CASES)
def test_exactly_k_steps_with_gaps_that_differ_by_at_most_one(case: tuple[int, int]) -> None:
    total, budget = case
    steps = Uniform().schedule(Problem(total), budget).recompute_steps
    gaps = {after - before for before, after in zip(steps, (*steps[1:], total), strict=True)}
    assert len(steps) == budget
    assert max(gaps) - min(gaps) <= 1


def test_three_warm_up_steps_are_taylorseers_schedule() -> None:
    steps = Uniform(warmup=3).schedule(Problem(50), 10).recompute_steps
    assert steps == (0, 1, 2, 8, 14, 20, 26, 32, 38, 44)


@given(CASES)
def test_warm_up_keeps_the_budget(case: tuple[int, int]) -> None:
    total, budget = case
    warmup = min(3, budget)
    schedule = Uniform(warmup).schedule(Problem(total), budget)
    assert schedule.budget == budget
    assert schedule.recompute_steps[:warmup] == tuple(range(warmup))


@pytest.mark.parametrize("warmup", [0, 4])
def test_a_warm_up_that_does_not_fit_is_refused(warmup: int) -> None:
    with pytest.raises(ScheduleError, match="does not fit budget 3"):
        Uniform(warmup).schedule(Problem(50), 3)
