"""Schedules and features of one loop, for another."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recache_compile.ir.carry_over import carry_over, interpolation
from recache_compile.ir.forecasters import Fitted
from recache_compile.ir.schedule import Schedule


@st.composite
def cases(draw: st.DrawFn) -> tuple[Schedule, int, int, tuple[float, ...], tuple[float, ...]]:
    one, other = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    budget = draw(st.integers(1, other))
    held = draw(st.integers(1, min(one, budget)))
    later = draw(st.permutations(range(1, one)))[: held - 1]
    levels = st.floats(0, 1)
    known = draw(st.booleans())
    return (
        Schedule((0, *later), one),
        budget,
        other,
        tuple(sorted(draw(st.lists(levels, min_size=one, max_size=one)), reverse=True)) if known else (),
        tuple(sorted(draw(st.lists(levels, min_size=other, max_size=other)), reverse=True)) if known else (),
    )


@given(cases())
def test_the_budget_is_kept_in_every_loop(
    case: tuple[Schedule, int, int, tuple[float, ...], tuple[float, ...]],
) -> None:
    schedule, budget, other, levels, others = case
    found = carry_over(schedule, budget, other, levels, others)
    assert (found.budget, found.num_steps) == (budget, other)
    if other == schedule.num_steps and budget == schedule.budget and not levels:
        assert found == schedule


def test_steps_go_to_the_nearest_noise_level() -> None:
    schedule = Schedule((0, 1, 4), 6)
    levels, others = (1.0, 0.9, 0.7, 0.4, 0.2, 0.1), (1.0, 0.95, 0.89, 0.6, 0.5, 0.3, 0.19, 0.05)
    assert carry_over(schedule, 3, 8, levels, others) == Schedule((0, 2, 6), 8)
    assert carry_over(schedule, 3, 12) == Schedule((0, 2, 8), 12)
    assert carry_over(Schedule((0, 1, 2), 10), 3, 3) == Schedule.every(3)


@pytest.mark.parametrize(("budget", "steps"), [(3, (0, 4, 8)), (4, (0, 2, 4, 8)), (5, (0, 2, 4, 6, 8))])
def test_the_widest_gaps_are_halved_for_a_larger_budget(budget: int, steps: tuple[int, ...]) -> None:
    assert carry_over(Schedule((0, 2, 4), 6), budget, 12) == Schedule(steps, 12)


def test_what_is_linear_in_the_noise_level_is_interpolated_exactly() -> None:
    levels, others = (1.0, 0.7, 0.6, 0.2), (1.0, 0.8, 0.65, 0.3, 0.2)
    weights = interpolation(4, 5, levels, others)
    assert weights.shape == (5, 4)
    np.testing.assert_allclose(
        weights @ np.array([[3 * level + 1] for level in levels])[:, 0], 3 * np.array(others) + 1
    )
    np.testing.assert_allclose(interpolation(4, 4), np.eye(4), atol=1e-12)


def test_fitted_is_fitted_to_interpolated_features() -> None:
    levels, others = (1.0, 0.7, 0.6, 0.2), (1.0, 0.8, 0.65, 0.3, 0.2)
    features = np.array([[2 * level + 1, level - 3] for level in levels])
    between = np.array([[2 * level + 1, level - 3] for level in others])
    fitted = Fitted(tuple(map(tuple, (features @ features.T).tolist())), ridge=1e-12)
    found = fitted.interpolated(interpolation(4, 5, levels, others)).coefficients((0, 1), 3)
    np.testing.assert_allclose(found @ between[[1, 0]], between[3], rtol=1e-4)
