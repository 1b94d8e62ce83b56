from itertools import combinations

import numpy as np
import pytest

from recache_compile.errors import ScheduleError
from recache_compile.ir.forecasters import Fitted, Forecaster, Newton, Reuse, Taylor
from recache_compile.policies.base import Calibration, Policy, Problem
from recache_compile.policies.dynamic import DynamicProgram, Minimax

TOTAL = 9
SAMPLES = 3


def smooth_features(seed: int, total: int = TOTAL) -> np.ndarray:
    """Features (samples, T, 6) along random sums of three slow waves."""
    random = np.random.default_rng(seed)
    time = np.linspace(0, 1, total) ** random.uniform(0.5, 2)
    waves = np.stack([np.sin(rate * time + phase) for rate, phase in random.uniform(0.5, 6, (3, 2))])
    return np.einsum("swd,wt->std", random.normal(size=(SAMPLES, 3, 6)), waves)


def calibration_of(features: np.ndarray) -> Calibration:
    gram = np.einsum("sad,sbd->sab", features, features)
    steps = np.ones(features.shape[1])
    return Calibration(gram, gram, steps, steps, steps)


def fitted_to(features: np.ndarray, order: int) -> Fitted:
    gram = calibration_of(features).features.sum(axis=0)
    return Fitted(tuple(tuple(row) for row in gram.tolist()), order=order)


def segment_sums(features: np.ndarray, forecaster: Forecaster, steps: tuple[int, ...]) -> list[float]:
    """By running the forecaster along the loop, without Gram matrices."""
    sums: list[float] = []
    for step in range(features.shape[1]):
        if step in steps:
            sums.append(0.0)
            continue
        anchors = [anchor for anchor in steps if anchor < step][-(forecaster.order + 1) :]
        weights = forecaster.coefficients(anchors, step)
        forecast = sum(weight * features[:, anchor] for weight, anchor in zip(weights, anchors[::-1], strict=True))
        sums[-1] += float(np.sqrt(((forecast - features[:, step]) ** 2).sum(axis=1).mean()))
    return sums


def forecasters_for(features: np.ndarray) -> list[Forecaster]:
    return [Reuse(), Taylor(1), Taylor(2), Newton(2), fitted_to(features, 1), fitted_to(features, 2)]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("number", range(6))
@pytest.mark.parametrize("policy", [DynamicProgram(), Minimax()], ids=["sum", "largest"])
def test_no_schedule_is_better(policy: Policy, number: int, seed: int) -> None:
    features = smooth_features(seed)
    forecaster = forecasters_for(features)[number]
    problem = Problem(TOTAL, forecaster, calibration_of(features))

    def cost(steps: tuple[int, ...]) -> tuple[float, float]:
        sums = segment_sums(features, forecaster, steps)
        # to 6 digits, so that equals which differ in rounding are told apart by the sum
        return (round(max(sums), 6) if isinstance(policy, Minimax) else 0.0, sum(sums))

    for budget in range(1, TOTAL + 1):
        found = policy.schedule(problem, budget)
        best = min(cost((0, *rest)) for rest in combinations(range(1, TOTAL), budget - 1))
        assert found.budget == budget
        assert cost(found.recompute_steps) == pytest.approx(best, abs=1e-5)


def test_minimax_lowers_the_largest_error_and_the_sum_pays_for_it() -> None:
    features = smooth_features(1, 16)
    problem = Problem(16, Taylor(1), calibration_of(features))
    by_sum, by_largest = (policy.schedule(problem, 5) for policy in (DynamicProgram(), Minimax()))
    sums = segment_sums(features, Taylor(1), by_sum.recompute_steps)
    others = segment_sums(features, Taylor(1), by_largest.recompute_steps)
    assert max(others) < max(sums)
    assert sum(others) > sum(sums)


def test_steps_go_where_the_features_change() -> None:
    features = np.zeros((1, 20, 1))
    features[0, 12:] = np.arange(8)[:, None] + 1.0
    schedule = DynamicProgram().schedule(Problem(20, Reuse(), calibration_of(features)), 9)
    assert schedule.recompute_steps == (0, *range(12, 20))


def test_more_anchors_than_steps() -> None:
    features = smooth_features(0, 2)
    problem = Problem(2, Taylor(4), calibration_of(features))
    for budget in (1, 2):
        assert DynamicProgram().schedule(problem, budget).recompute_steps == tuple(range(budget))


@pytest.mark.parametrize("policy", [DynamicProgram(), Minimax()])
def test_what_is_missing_is_named(policy: Policy) -> None:
    with pytest.raises(ScheduleError, match="needs a few uncached generations"):
        policy.schedule(Problem(TOTAL, Reuse()), 3)
    with pytest.raises(ScheduleError, match="needs a forecaster"):
        policy.schedule(Problem(TOTAL, None, calibration_of(smooth_features(0))), 3)


def test_too_many_histories_are_refused() -> None:
    problem = Problem(60, Taylor(5), calibration_of(smooth_features(0, 60)))
    with pytest.raises(ScheduleError, match="order 5 on 60 steps"):
        DynamicProgram().schedule(problem, 5)
