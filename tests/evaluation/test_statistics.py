"""Means, distances of sets and losses against independent formulas, and their errors against repetition."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance

from recache_compile.evaluation.estimates import Reference
from recache_compile.evaluation.result import EvaluationLine, EvaluationResult
from recache_compile.evaluation.statistics import (
    Estimate,
    Verdict,
    distance_of_sets,
    frechet,
    jackknife,
    mean,
    relative_loss,
    relative_loss_of_sets,
    verdict,
)
from recache_compile.evaluation.wording import percent, plain


class Identity(nn.Module):
    """Features in place of pictures."""

    num_features = 6

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features


def features(count: int, seed: int, width: int = 6) -> np.ndarray:
    random = np.random.default_rng(seed)
    return random.normal(size=(count, width)) @ random.normal(size=(width, width)) + random.normal(size=width)


@pytest.mark.parametrize(("count", "others"), [(50, 40), (7, 90), (5, 6)])
def test_frechet_distance_is_that_of_torchmetrics(count: int, others: int) -> None:
    one, other = features(count, 0), features(others, 1)
    metric = FrechetInceptionDistance(feature=Identity()).set_dtype(torch.float64)
    metric.update(torch.from_numpy(one), real=True)
    metric.update(torch.from_numpy(other), real=False)
    assert frechet(one, other) == pytest.approx(float(metric.compute()), rel=1e-5)
    assert frechet(other, one) == pytest.approx(frechet(one, other))


def test_frechet_distance_of_a_set_to_itself_and_to_its_shift() -> None:
    one = features(30, 0)
    assert frechet(one, one) == pytest.approx(0, abs=1e-9)
    assert frechet(one, one + 2.0) == pytest.approx(6 * 4.0)


def test_frechet_distance_is_known_for_one_dimension() -> None:
    one, other = features(40, 0, 1), features(60, 1, 1)
    expected = (one.mean() - other.mean()) ** 2 + (one.std(ddof=1) - other.std(ddof=1)) ** 2
    assert frechet(one, other) == pytest.approx(expected)


def test_the_jackknife_of_a_mean_is_its_standard_error() -> None:
    values = np.random.default_rng(0).normal(size=30)  # as many groups as values
    found = jackknife(30, lambda kept: float(values[kept].mean()))
    assert found.value == pytest.approx(mean(values).value)
    assert found.error == pytest.approx(mean(values).error)


def test_the_error_of_a_distance_is_its_spread_over_repetitions() -> None:
    reference = features(400, 1)
    random, shape = np.random.default_rng(2), np.random.default_rng(1).normal(size=(6, 6))
    drawn = [distance_of_sets(random.normal(size=(300, 6)) @ shape, reference) for _ in range(40)]
    spread = np.std([each.value for each in drawn], ddof=1)
    assert np.mean([each.error for each in drawn]) == pytest.approx(spread, rel=0.4)


def test_one_sample_has_no_error() -> None:
    assert mean(np.array([3.0])) == Estimate(3.0, None)
    assert relative_loss(np.array([1.0]), np.array([2.0]), True) == Estimate(0.5, None)


@pytest.mark.parametrize(("higher", "expected"), [(True, 0.1), (False, -0.1)])
def test_a_loss_is_a_part_of_the_uncached_mean(higher: bool, expected: float) -> None:
    uncached = np.array([8.0, 12.0, 10.0])
    found = relative_loss(0.9 * uncached, uncached, higher)
    assert found is not None
    assert found.value == pytest.approx(expected)


def test_a_loss_that_all_samples_share_has_no_error_however_much_they_differ() -> None:
    uncached = np.array([1.0, 90.0, 9.0])
    found = relative_loss(uncached - 1, uncached, True)
    assert found is not None
    assert found.error == pytest.approx(0)


def test_there_is_no_loss_relative_to_nothing() -> None:
    assert relative_loss(np.ones(3), np.zeros(3), True) is None
    assert relative_loss_of_sets(features(9, 0), features(9, 1), features(9, 1)) is None


def test_the_loss_of_sets_is_beside_the_uncached_distance() -> None:
    uncached, reference = features(60, 0), features(80, 1)
    assert relative_loss_of_sets(uncached, uncached, reference) == Estimate(0.0, 0.0)
    farther = relative_loss_of_sets(uncached + 3 * (uncached.mean(0) - reference.mean(0)), uncached, reference)
    assert farther is not None
    assert farther.value == pytest.approx(
        frechet(uncached + 3 * (uncached.mean(0) - reference.mean(0)), reference) / frechet(uncached, reference) - 1
    )


@pytest.mark.parametrize(
    ("macs", "speed", "losses", "expected"),
    [
        (3.0, 2.5, ((0.0, 0.004), (0.005, 0.001)), "pass"),
        (3.0, 2.5, ((-0.2, 0.01),), "pass"),
        (3.0, 2.5, ((0.01, None),), "pass?"),
        (3.0, 2.5, ((0.009, 0.001), (0.0, 0.001)), "pass?"),
        (3.0, 2.5, ((0.012, 0.002), (0.0, 0.001)), "fail?"),
        (3.0, 2.5, ((0.02, 0.004), (0.012, 0.1)), "fail"),
        (3.0, 2.5, ((None, None), (0.0, 0.1)), "fail"),
        (1.9, 2.5, ((0.0, 0.0),), "fail"),
        (3.0, 1.9, ((0.0, 0.0),), "fail"),
        (3.0, 2.5, (), "unknown"),
    ],
)
def test_the_target_takes_all_of_macs_speed_and_quality(
    macs: float, speed: float, losses: tuple[tuple[float | None, float | None], ...], expected: str
) -> None:
    assert verdict(macs, speed, [Estimate(*loss) for loss in losses], samples=500) == expected


def test_few_samples_that_do_not_differ_leave_a_doubt() -> None:
    assert verdict(3.0, 2.5, [Estimate(0.0, 0.0)], samples=301) == "pass"
    assert verdict(3.0, 2.5, [Estimate(0.0, 0.0)], samples=299) == "pass?"


def test_values_that_are_not_finite_are_told_as_such() -> None:
    bad = np.array([1.0, np.nan, 2.0])
    assert mean(bad) == Estimate(None, None)
    assert relative_loss(bad, np.ones(3), True) == Estimate(None, None)
    rows = features(9, 0)
    rows[3, 2] = np.inf
    assert distance_of_sets(rows, features(9, 1)) == Estimate(None, None)


def test_a_set_tells_a_loss_where_it_is_real_and_large() -> None:
    assert Reference("pictures", features(50, 0), True).shows_loss(7)
    assert not Reference("pictures", features(50, 0), True).shows_loss(6)
    assert not Reference("pictures", features(6, 0), True).shows_loss(50)
    assert not Reference("samples", features(50, 0), False).shows_loss(50)


def line(budget: int, target: Verdict, speedup: float = 3.0) -> EvaluationLine:
    return EvaluationLine("p", budget, (0,), 4.0, speedup, 1.0, 0, 0, {}, {}, target)


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ((line(5, "fail"), line(7, "pass?"), line(9, "pass")), 7),
        ((line(5, "pass"), line(7, "fail"), line(9, "pass")), 9),
        ((line(5, "pass"), line(7, "fail?")), None),
        ((line(5, "pass"), line(30, "fail", speedup=1.5)), 5),
        ((), None),
    ],
)
def test_the_smallest_budget_is_one_from_which_on_all_pass(
    lines: tuple[EvaluationLine, ...], expected: int | None
) -> None:
    assert EvaluationResult.smallest(SimpleNamespace(lines=lines), "p") == expected  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("estimate", "text", "part"),
    [
        (Estimate(0.01234, 0.0056), "0.0123 ± 0.0056", "+1.2 ± 0.6 %"),
        (Estimate(123.4, 12.0), "123 ± 12", "+12340.0 ± 1200.0 %"),
        (Estimate(5.0, None), "5", "+500.0 %"),
        (Estimate(1.0, 0.0), "1", "+100.0 ± 0.0 %"),
        (Estimate(None, None), "not finite", "not finite"),
    ],
)
def test_numbers_are_written_to_the_second_digit_of_their_error(estimate: Estimate, text: str, part: str) -> None:
    assert (plain(estimate), percent(estimate)) == (text, part)
