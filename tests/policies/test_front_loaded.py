import pytest
from hypothesis import given
from hypothesis import strategies as st

from recache_compile.errors import ScheduleError
from recache_compile.policies.base import Problem
from recache_compile.policies.front_loaded import FrontLoaded
from recache_compile.policies.uniform import Uniform

CASES = st.integers(1, 80).flatmap(lambda total: st.tuples(st.just(total), st.integers(1, total)))


@given(CASES, st.floats(0.3, 6))
def test_exactly_k_steps(case: tuple[int, int], power: float) -> None:
    total, budget = case
    assert FrontLoaded(power).schedule(Problem(total), budget).budget == budget


def test_power_one_is_uniform() -> None:
    assert FrontLoaded(1.0).schedule(Problem(50), 8) == Uniform().schedule(Problem(50), 8)


def test_larger_powers_move_steps_to_the_front() -> None:
    sums = [sum(FrontLoaded(power).schedule(Problem(50), 9).recompute_steps) for power in (1.0, 1.5, 2.5)]
    assert sums == sorted(sums, reverse=True)


@pytest.mark.parametrize("power", [0.0, -1.0, float("nan"), float("inf")])
def test_unusable_powers_are_refused(power: float) -> None:
    with pytest.raises(ScheduleError, match="positive number"):
        FrontLoaded(power).schedule(Problem(50), 5)
