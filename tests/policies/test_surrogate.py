from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recache_compile.ir.forecasters import Fitted, Forecaster, HiCache, Newton, Reuse, Taylor
from recache_compile.ir.schedule import Schedule
from recache_compile.policies.moves import random_schedule
from recache_compile.policies.surrogate import Surrogate
from tests.policies.fakes import calibration_of, trajectories

TOTAL = 13
Forecast = Callable[[list[int], list[np.ndarray], int], np.ndarray]
"""From the anchors so far, oldest first, and their predictions to the prediction of a later step."""


def newest(anchors: list[int], values: list[np.ndarray], step: int) -> np.ndarray:
    return values[-1]


def straight_line(slope: float) -> Forecast:
    def forecast(anchors: list[int], values: list[np.ndarray], step: int) -> np.ndarray:
        if len(anchors) == 1:
            return values[-1]
        gradient = (values[-1] - values[-2]) / (anchors[-1] - anchors[-2])
        return values[-1] + slope * gradient * (step - anchors[-1])

    return forecast


def parabola(anchors: list[int], values: list[np.ndarray], step: int) -> np.ndarray:
    held = anchors[-3:]
    powers = np.vander(np.array(held, dtype=float), len(held), increasing=True)
    coefficients = np.linalg.solve(powers, np.array(values[-3:]).reshape(len(held), -1))
    return (float(step) ** np.arange(len(held)) @ coefficients).reshape(values[-1].shape)


def taylor_of_order_2(anchors: list[int], values: list[np.ndarray], step: int) -> np.ndarray:
    x = step - anchors[-1]
    slope = straight_line(1.0)(anchors, values, step) - values[-1]
    if len(anchors) < 3:
        return values[-1] + slope
    gap, older = anchors[-1] - anchors[-2], anchors[-2] - anchors[-3]
    curve = ((values[-1] - values[-2]) / gap - (values[-2] - values[-3]) / older) / gap
    return values[-1] + slope + curve * x**2 / 2


def least_squares(predictions: np.ndarray, order: int) -> Forecast:
    def forecast(anchors: list[int], values: list[np.ndarray], step: int) -> np.ndarray:
        held = anchors[-order - 1 :]
        known = predictions[:, held].swapaxes(1, 2).reshape(-1, len(held))
        weights = np.linalg.lstsq(known, predictions[:, step].reshape(-1), rcond=None)[0]
        return sum((w * value for w, value in zip(weights, values[-order - 1 :], strict=True)), np.zeros(()))

    return forecast


def end_error(predictions: np.ndarray, sizes: np.ndarray, schedule: Schedule, forecast: Forecast) -> float:
    """Mean distance of the ends of two Euler loops, one of which caches."""
    distances = []
    for sample in predictions:
        full = cached = np.zeros(sample.shape[1])
        anchors: list[int] = []
        values: list[np.ndarray] = []
        for step, prediction in enumerate(sample):
            full = full + sizes[step] * prediction
            if schedule.mask[step] == "1":
                anchors.append(step)
                values.append(prediction)
                cached = cached + sizes[step] * prediction
            else:
                cached = cached + sizes[step] * forecast(anchors, values, step)
        distances.append(np.linalg.norm(full - cached))
    return float(np.mean(distances))


PREDICTIONS = trajectories(TOTAL)
GRAM = tuple(tuple(row) for row in calibration_of(PREDICTIONS).features.sum(0).tolist())
FORECASTS: list[tuple[Forecaster, Forecast]] = [
    (Reuse(), newest),
    (Taylor(1), straight_line(1.0)),
    (Taylor(2), taylor_of_order_2),
    (HiCache(1), straight_line(0.5)),
    (Newton(2), parabola),
    (Fitted(GRAM, order=0, ridge=0.0), least_squares(PREDICTIONS, 0)),
    (Fitted(GRAM, order=2, ridge=0.0), least_squares(PREDICTIONS, 2)),
]


@pytest.mark.parametrize(("forecaster", "forecast"), FORECASTS, ids=lambda each: getattr(each, "name", ""))
@given(budget=st.integers(1, TOTAL), seed=st.integers(0, 999))
@settings(max_examples=12, deadline=None)
def test_the_error_is_that_of_an_euler_loop(forecaster: Forecaster, forecast: Forecast, budget: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    sizes = -random.uniform(0.01, 0.2, TOTAL)
    schedules = [random_schedule(TOTAL, budget, random) for _ in range(2)]
    found = Surrogate(calibration_of(PREDICTIONS, sizes), forecaster).errors(schedules)
    expected = [end_error(PREDICTIONS, sizes, schedule, forecast) for schedule in schedules]
    tiny = 1e-7 if min(expected) < 1e-4 else 1e-9  # a difference of squares loses half of the digits
    assert found == pytest.approx(expected, rel=1e-9, abs=tiny)


def test_one_sample_alone_is_its_own_distance() -> None:
    grams = calibration_of(PREDICTIONS)
    schedule = Schedule((0, 3, 4, 9), TOTAL)
    alone = [
        Surrogate(calibration_of(PREDICTIONS[[number]]), Taylor(1)).errors([schedule])[0]
        for number in range(len(PREDICTIONS))
    ]
    assert Surrogate(grams, Taylor(1)).errors([schedule])[0] == pytest.approx(np.mean(alone), rel=1e-12)


def test_no_cached_step_means_no_error() -> None:
    every = Schedule.every(TOTAL)
    assert Surrogate(calibration_of(PREDICTIONS), Taylor(1)).errors([every]).tolist() == [0.0]


def test_a_motion_that_the_forecaster_knows_has_no_error() -> None:
    line = np.arange(TOTAL)[None, :, None] * np.array([1.0, -2.0]) + 3
    surrogate = Surrogate(calibration_of(line), Taylor(1))
    known, unknown = Schedule((0, 1, 7), TOTAL), Schedule((0, 7), TOTAL)
    errors = surrogate.errors([known, unknown])
    assert errors[0] == pytest.approx(0, abs=1e-6)
    assert errors[1] > 1


def test_errors_that_cancel_are_seen_to_cancel() -> None:
    up_and_down = np.array([0, 1.0, -1.0, 0])[None, :, None]
    surrogate = Surrogate(calibration_of(up_and_down), Reuse())
    one, two = surrogate.errors([Schedule((0, 1, 3), 4), Schedule((0, 3), 4)])
    assert two == pytest.approx(0, abs=1e-9)
    assert one == pytest.approx(2 / 4)


def test_what_was_asked_before_changes_nothing() -> None:
    random = np.random.default_rng(0)
    schedules = [random_schedule(TOTAL, 5, random) for _ in range(20)]
    used = Surrogate(calibration_of(PREDICTIONS), Taylor(2))
    together = used.errors(schedules)
    assert used.errors(schedules[::-1])[::-1].tolist() == pytest.approx(together.tolist(), rel=1e-12)
    apart = [Surrogate(calibration_of(PREDICTIONS), Taylor(2)).errors([each])[0] for each in schedules]
    assert apart == pytest.approx(together.tolist(), rel=1e-12)
