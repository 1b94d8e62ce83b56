from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recache_compile.ir.schedule import Schedule
from recache_compile.policies.moves import descend, random_schedule, relocations
from tests.policies.fakes import mask_of, pairwise, separable

CASES = st.integers(1, 9).flatmap(lambda total: st.tuples(st.just(total), st.integers(1, total)))


def all_schedules(total: int, budget: int) -> list[Schedule]:
    return [Schedule((0, *rest), total) for rest in combinations(range(1, total), budget - 1)]


@given(CASES, st.integers(0, 99))
@settings(deadline=None)
def test_relocations_are_all_schedules_that_differ_in_one_step(case: tuple[int, int], seed: int) -> None:
    start = random_schedule(*case, np.random.default_rng(seed))
    found = relocations(start)
    steps = set(start.recompute_steps)
    expected = {each for each in all_schedules(*case) if len(steps - set(each.recompute_steps)) == 1}
    assert set(found) == expected
    assert len(found) == len(expected)


@given(CASES, st.integers(0, 99))
@settings(deadline=None)
def test_random_schedules_have_exactly_k_steps(case: tuple[int, int], seed: int) -> None:
    total, budget = case
    one, same = (random_schedule(total, budget, np.random.default_rng(seed)) for _ in range(2))
    assert one == same
    assert (one.budget, one.num_steps) == (budget, total)


def test_random_schedules_are_all_equally_likely() -> None:
    random = np.random.default_rng(0)
    drawn = [random_schedule(6, 3, random) for _ in range(4000)]
    for each in all_schedules(6, 3):
        assert drawn.count(each) == pytest.approx(400, abs=4.5 * (4000 * 0.1 * 0.9) ** 0.5)


@pytest.mark.parametrize("seed", range(4))
def test_descent_finds_the_optimum_of_a_separable_loss(seed: int) -> None:
    loss = separable(10, seed)
    found, value = descend(
        random_schedule(10, 4, np.random.default_rng(seed)), lambda each: np.array([loss(mask_of(one)) for one in each])
    )
    assert value == pytest.approx(min(loss(mask_of(each)) for each in all_schedules(10, 4)))
    assert value == loss(mask_of(found))


@pytest.mark.parametrize("seed", range(4))
def test_descent_ends_where_no_move_is_better_and_not_above_its_start(seed: int) -> None:
    loss = pairwise(14, seed, strength=3.0)
    start = random_schedule(14, 5, np.random.default_rng(seed))
    found, value = descend(start, lambda each: np.array([loss(mask_of(one)) for one in each]))
    assert value <= loss(mask_of(start))
    assert all(loss(mask_of(move)) >= value for move in relocations(found))


def test_descent_stays_where_everything_is_equal() -> None:
    start = Schedule((0, 2, 5), 8)
    assert descend(start, lambda each: np.ones(len(each))) == (start, 1.0)


@pytest.mark.parametrize("budget", [1, 6])
def test_descent_without_moves_scores_its_start(budget: int) -> None:
    start = Schedule(tuple(range(budget)), 6)
    assert descend(start, lambda each: np.full(len(each), 7.0)) == (start, 7.0)
