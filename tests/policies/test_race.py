from itertools import combinations, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recache_compile.ir.schedule import Schedule
from recache_compile.policies.moves import random_schedule
from recache_compile.policies.race import race
from tests.policies.fakes import FakeObjective, mask_of, separable

EVERY = [Schedule((0, *rest), 8) for rest in combinations(range(1, 8), 3)]


def some(count: int, seed: int = 0) -> list[Schedule]:
    random = np.random.default_rng(seed)
    return [random_schedule(16, 6, random) for _ in range(count)]


@given(st.integers(1, 30), st.integers(1, 8), st.integers(1, 5), st.integers(1, 4), st.floats(0, 3))
@settings(max_examples=60, deadline=None)
def test_as_many_are_left_as_were_to_be_kept(
    count: int, keep: int, batches: int, batch_size: int, noise: float
) -> None:
    objective = FakeObjective(
        separable(16), noise=noise, training=tuple(range(batches)), batch_size=batch_size, held_out=()
    )
    candidates = some(count)
    left = race(candidates, objective, keep)
    assert len(left) >= min(keep, len(set(candidates)))
    assert {schedule for schedule, _ in left} <= set(candidates)
    assert len({schedule for schedule, _ in left}) == len(left)


@pytest.mark.parametrize("noise", [0.0, 0.02])
def test_the_best_wins_where_noise_is_small(noise: float) -> None:
    loss = separable(8)
    objective = FakeObjective(loss, noise=noise, common=5.0)
    (winner, value), *_ = race(EVERY, objective)
    assert winner == min(EVERY, key=lambda each: loss(mask_of(each)))
    assert value == pytest.approx(objective.mean(winner))


def test_those_left_are_ordered_by_their_mean_over_all_batches() -> None:
    objective = FakeObjective(separable(8), noise=0.3)
    left = race(EVERY, objective, keep=6)
    assert [value for _, value in left] == pytest.approx([objective.mean(schedule) for schedule, _ in left])
    assert all(before[1] <= after[1] for before, after in pairwise(left))


def test_it_takes_less_than_all_on_all() -> None:
    objective = FakeObjective(separable(8), noise=0.05)
    race(EVERY, objective)
    everything = len(EVERY) * len(objective.training) * objective.batch_size
    halves = len(EVERY) * objective.batch_size * (1 + 1 / 2 + 1 / 4)
    assert objective.generations <= halves + 2 * objective.batch_size < everything


def test_rounds_double_and_ask_those_that_are_left_alone() -> None:
    objective = FakeObjective(separable(8), noise=3.0, training=tuple(range(6)))
    race(EVERY, objective, keep=2)
    assert [len(batches) for _, batches in objective.calls] == [1, 2, 4, 6]
    counts = [len(schedules) for schedules, _ in objective.calls]
    assert counts == sorted(counts, reverse=True)
    for (before, _), (after, _) in pairwise(objective.calls):
        assert set(after) <= set(before)


def test_a_clear_winner_leaves_no_more_than_are_to_be_kept_and_those_run_on_all() -> None:
    objective = FakeObjective(lambda mask: 0.0 if mask[:4].all() else 10.0, noise=0.01)
    race(EVERY, objective, keep=3)
    assert [len(schedules) for schedules, _ in objective.calls] == [len(EVERY), 3]
    assert objective.calls[-1][1] == objective.training


@pytest.mark.filterwarnings("error")
def test_one_sample_says_nothing_of_the_noise() -> None:
    objective = FakeObjective(separable(8), batch_size=1)
    race(EVERY, objective, keep=2)
    assert len(objective.calls[1][0]) == (len(EVERY) + 1) // 2


def test_a_candidate_named_twice_runs_once() -> None:
    objective = FakeObjective(separable(8))
    left = race([EVERY[0], EVERY[1], EVERY[0]], objective)
    assert {schedule for schedule, _ in left} == set(EVERY[:2])
    assert len(left) == 2


def test_the_same_race_has_the_same_end() -> None:
    first, second = (race(EVERY, FakeObjective(separable(8), noise=0.4)) for _ in range(2))
    assert first == second
