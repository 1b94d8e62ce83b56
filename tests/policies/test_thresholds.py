from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recache_compile.errors import ScheduleError
from recache_compile.policies.base import Calibration, Policy, Problem
from recache_compile.policies.thresholds import MagCache, TeaCache

TOTAL = 24


def problem_of(changes: np.ndarray | None = None, ratios: np.ndarray | None = None) -> Problem:
    given_values = changes if changes is not None else ratios
    assert given_values is not None
    total = len(given_values)
    ones = np.ones(total)
    gram = np.ones((1, total, total))
    calibration = Calibration(
        gram, gram, ones, ones if changes is None else changes, ones if ratios is None else ratios
    )
    return Problem(total, calibration=calibration)


def replay_teacache(changes: np.ndarray, delta: float) -> tuple[int, ...]:
    steps, accumulated = [0], 0.0
    for step in range(1, len(changes)):
        accumulated += changes[step]
        if accumulated >= delta:
            steps.append(step)
            accumulated = 0.0
    return tuple(steps)


def replay_magcache(ratios: np.ndarray, delta: float, skips: int) -> tuple[int, ...]:
    steps, product, error, skipped = [0], 1.0, 0.0, 0
    for step in range(1, len(ratios)):
        product *= ratios[step]
        error += abs(1 - product)
        skipped += 1
        if error > delta or skipped > skips:
            steps.append(step)
            product, error, skipped = 1.0, 0.0, 0
    return tuple(steps)


@pytest.mark.parametrize("seed", range(4))
def test_teacache_is_the_papers_rule_at_some_threshold(seed: int) -> None:
    changes = np.random.default_rng(seed).uniform(0.01, 0.3, TOTAL)
    changes[0] = 0.0
    replayed = defaultdict(set)
    for delta in np.linspace(0, changes.sum(), 20_000):
        steps = replay_teacache(changes, delta)
        replayed[len(steps)].add(steps)
    for budget in replayed:
        assert TeaCache().schedule(problem_of(changes), budget).recompute_steps in replayed[budget]
    assert len(replayed) > 15


@pytest.mark.parametrize("skips", [0, 4])
@pytest.mark.parametrize("seed", range(2))
def test_magcache_is_the_papers_rule_at_some_threshold(seed: int, skips: int) -> None:
    ratios = np.random.default_rng(seed).uniform(0.8, 0.995, TOTAL)
    ratios[0] = 1.0
    replayed = defaultdict(set)
    for delta in np.geomspace(0.005, TOTAL, 20_000):
        steps = replay_magcache(ratios, delta, skips or TOTAL)
        replayed[len(steps)].add(steps)
    for budget in replayed:
        assert MagCache(skips).schedule(problem_of(ratios=ratios), budget).recompute_steps in replayed[budget]
    assert len(replayed) > 10


def test_ties_take_the_smallest_threshold_that_fits_and_add_the_most_due() -> None:
    changes = np.array([0.0, *[1.0] * 11])
    # gaps of 4 take 3 steps, gaps of 3 take 4, gaps of 2 take 6
    assert TeaCache().schedule(problem_of(changes), 4).recompute_steps == (0, 3, 6, 9)
    assert TeaCache().schedule(problem_of(changes), 5).recompute_steps == (0, 2, 3, 6, 9)


@given(st.lists(st.sampled_from([0.0, 0.1, 0.5]), min_size=1, max_size=30), st.data())
def test_every_budget_is_met_exactly(values: list[float], data: st.DataObject) -> None:
    budget = data.draw(st.integers(1, len(values)))
    for policy, problem in (
        (TeaCache(), problem_of(np.array(values))),
        (MagCache(), problem_of(ratios=0.8 + np.array(values))),
    ):
        schedule = policy.schedule(problem, budget)
        assert schedule.budget == budget
        assert schedule == policy.schedule(problem, budget)


@given(st.integers(1, 30), st.integers(1, 8), st.data())
def test_skips_are_never_more_than_allowed(total: int, skips: int, data: st.DataObject) -> None:
    budget = data.draw(st.integers(-(-total // (skips + 1)), total))
    ratios = 1 + 0.1 * np.sin(np.arange(total))
    steps = MagCache(skips).schedule(problem_of(ratios=ratios), budget).recompute_steps
    assert len(steps) == budget
    assert max(after - before for before, after in zip(steps, (*steps[1:], total), strict=True)) <= skips + 1


def test_unusable_options_are_refused() -> None:
    with pytest.raises(ScheduleError, match="budget 5 leaves more than 3 cached steps"):
        MagCache(skips=3).schedule(problem_of(ratios=np.ones(TOTAL)), 5)
    with pytest.raises(ScheduleError, match="expected 0 or more"):
        MagCache(skips=-1).schedule(problem_of(ratios=np.ones(TOTAL)), 5)


@pytest.mark.parametrize("policy", [TeaCache(), MagCache()])
def test_a_missing_calibration_is_named(policy: Policy) -> None:
    with pytest.raises(ScheduleError, match="needs a few uncached generations"):
        policy.schedule(Problem(TOTAL), 5)
