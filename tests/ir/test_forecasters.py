"""Coefficient tables against published values, closed forms and exactness properties."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recache_compile.errors import ScheduleError
from recache_compile.ir.forecasters import FORECASTERS, Fitted, HiCache, Newton, Reuse, Taylor, get_forecaster

GRIDS = st.lists(st.integers(0, 60), min_size=1, max_size=5, unique=True).map(sorted)


@pytest.mark.parametrize(
    ("anchors", "position", "expected"),
    [((2, 8, 14), 17, [1.625, -0.75, 0.125]), ((6, 11, 24), 30, [1.568, -0.845, 0.277])],
)
def test_taylor_of_order_2(anchors: tuple[int, ...], position: int, expected: list[float]) -> None:
    assert Taylor(2).coefficients(anchors, position) == pytest.approx(expected, abs=6e-4)


@pytest.mark.parametrize(
    ("anchors", "position", "expected"),
    [((2, 8, 14), 17, [1.875, -1.25, 0.375]), ((6, 11, 24), 30, [1.949, -2.215, 1.267])],
)
def test_newton_of_order_2(anchors: tuple[int, ...], position: int, expected: list[float]) -> None:
    assert Newton(2).coefficients(anchors, position) == pytest.approx(expected, abs=6e-4)


def test_taylor_of_order_1_is_a_straight_line() -> None:
    assert Taylor(1).coefficients((4, 10), 13) == pytest.approx([1 + 3 / 6, -3 / 6])


def test_hicache_of_order_1_has_half_the_slope_of_taylor() -> None:
    assert HiCache(1).coefficients((4, 10), 13) == pytest.approx([1 + 3 / 12, -3 / 12])


def test_hicache_of_order_2_written_out() -> None:
    x, gap, older, sigma = 3.0, 6.0, 5.0, 0.5
    slope, curve = sigma * 2 * sigma * x, sigma**2 * (4 * (sigma * x) ** 2 - 2) / 2
    expected = [
        1 + slope / gap + curve / gap**2,
        -slope / gap - curve / gap**2 - curve / (gap * older),
        curve / (gap * older),
    ]
    assert HiCache(2).coefficients((3, 8, 14), 17) == pytest.approx(expected)


def test_reuse_takes_the_newest() -> None:
    assert Reuse().coefficients((2, 8), 11) == (1.0, 0.0)


@given(GRIDS, st.integers(1, 30), st.sampled_from([Reuse(), Taylor(4), HiCache(4), Newton(4)]))
def test_weights_sum_to_one(grid: list[int], ahead: int, forecaster: object) -> None:
    weights = forecaster.coefficients(grid, grid[-1] + ahead)  # type: ignore[attr-defined]
    assert len(weights) == len(grid)
    assert sum(weights) == pytest.approx(1, abs=1e-6 * max(1, *np.abs(weights)))


@given(GRIDS, st.integers(1, 30))
def test_newton_reproduces_polynomials(grid: list[int], ahead: int) -> None:
    position, degree = grid[-1] + ahead, len(grid) - 1
    polynomial = np.polynomial.Polynomial(np.arange(1, degree + 2) / 10.0 ** np.arange(degree + 1))
    weights = Newton(4).coefficients(grid, position)
    scale = np.abs(weights) @ np.abs(polynomial(np.array(grid[::-1])))
    assert weights @ polynomial(np.array(grid[::-1])) == pytest.approx(polynomial(position), abs=1e-9 * scale + 1e-9)


def test_fewer_anchors_lower_the_order() -> None:
    assert Taylor(2).coefficients((5,), 7) == (1.0,)
    assert Taylor(3).coefficients((2, 5), 7) == pytest.approx(Taylor(1).coefficients((2, 5), 7))


@pytest.mark.parametrize(("name", "order", "message"), [("tailor", 1, "unknown"), ("taylor", -1, "0 or more")])
def test_unknown_forecasters_are_refused(name: str, order: int, message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        get_forecaster(name, order)


def test_without_an_order_each_forecaster_has_its_own() -> None:
    names = [*FORECASTERS, "fitted"]
    assert [get_forecaster(name, gram=[[1.0]]).order for name in names] == [0, 1, 2, 1, 1]
    assert [get_forecaster(name, 3, [[1.0]]).order for name in names] == [0, 3, 3, 3, 3]
    assert [get_forecaster(name, gram=[[1.0]]).name for name in names] == names


@pytest.mark.parametrize("order", [None, 2])
def test_fitted_needs_something_to_be_fitted_to(order: int | None) -> None:
    with pytest.raises(ScheduleError, match="forecaster fitted: needs a few uncached generations of the model"):
        get_forecaster("fitted", order)


def test_an_unknown_name_is_told_what_there_is() -> None:
    with pytest.raises(ScheduleError, match="choose one of reuse, taylor, hicache, newton, fitted"):
        get_forecaster("fited", gram=[[1.0]])


FEATURES = np.cumsum(np.random.default_rng(0).normal(size=(12, 40)), 0)
"""(T, coordinates) of a random walk."""


def fitted_to(features: np.ndarray, order: int, ridge: float = 1e-6) -> Fitted:
    made = get_forecaster("fitted", order, (features @ features.T).tolist())
    assert isinstance(made, Fitted)
    return Fitted(made.gram, made.order, ridge)


STEPS = st.lists(st.integers(0, 10), min_size=1, max_size=4, unique=True).map(sorted)


@given(STEPS, st.data())
def test_fitted_is_least_squares_on_the_features(anchors: list[int], data: st.DataObject) -> None:
    step = data.draw(st.integers(anchors[-1] + 1, 11))
    found = fitted_to(FEATURES, 3, ridge=0.0).coefficients(anchors, step)
    expected = np.linalg.lstsq(FEATURES[anchors[::-1]].T, FEATURES[step], rcond=None)[0]
    assert found == pytest.approx(expected, abs=1e-9)


@given(STEPS, st.data())
def test_the_ridge_is_so_many_rows_that_want_no_weights(anchors: list[int], data: st.DataObject) -> None:
    step = data.draw(st.integers(anchors[-1] + 1, 11))
    known, count = FEATURES[anchors[::-1]].T, len(anchors)
    damping = np.sqrt(0.3 * (known**2).sum() / count) * np.eye(count)
    rows, target = np.concatenate([known, damping]), np.concatenate([FEATURES[step], np.zeros(count)])
    expected = np.linalg.lstsq(rows, target, rcond=None)[0]
    assert fitted_to(FEATURES, 3, ridge=0.3).coefficients(anchors, step) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("rival", [Taylor(1), Taylor(2), HiCache(1), HiCache(2), Newton(2)])
@given(STEPS, st.data())
def test_fitted_beats_all_others_of_equal_history_where_it_was_fitted(
    rival: Taylor | HiCache | Newton, anchors: list[int], data: st.DataObject
) -> None:
    step = data.draw(st.integers(anchors[-1] + 1, 11))
    held = anchors[-rival.order - 1 :]

    def error(weights: tuple[float, ...]) -> float:
        return float(np.linalg.norm(weights @ FEATURES[held[::-1]] - FEATURES[step]))

    ours = error(fitted_to(FEATURES, rival.order, ridge=0.0).coefficients(held, step))
    assert ours <= error(rival.coefficients(held, step)) + 1e-9


def test_fitted_to_features_that_repeat_is_still_finite() -> None:
    same = np.ones((4, 3))
    weights = fitted_to(same, 1).coefficients((0, 2), 3)
    assert weights == pytest.approx([0.5, 0.5], abs=1e-5)
