"""From values of samples to what is told of them: means, distances of sets, losses, each with its standard error."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

GROUPS = 32
"""The jackknife leaves out this many groups of samples, one after another."""

TARGET_REDUCTION = 2.0
"""Times fewer multiply-accumulates, and times faster."""
TARGET_LOSS = 0.01
"""Of the uncached value, at most."""

SURE = 2.0
"""Standard errors."""

Verdict = Literal["pass", "pass?", "fail?", "fail", "unknown"]
"""With a question mark where a loss is within two standard errors of the limit."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A number with its standard error, which one sample does not tell; no number where values are not finite."""

    value: float | None
    error: float | None


def mean(values: np.ndarray) -> Estimate:
    """The mean of independent samples (n,)."""
    return _estimate(float(values.mean()), _error_of_mean(values))


def relative_loss(cached: np.ndarray, uncached: np.ndarray, higher: bool) -> Estimate | None:
    """How much worse the mean of cached samples is, as a part of the uncached mean; None where that is zero.

    Args:
        cached, uncached: (n,), of the same noise in the same places, which the error makes use of.
        higher: whether more is better.
    """
    sign, scale = (1 if higher else -1), abs(float(uncached.mean()))
    if scale == 0:
        return None
    worse = sign * (uncached - cached) / scale
    return _estimate(float(worse.mean()), _error_of_mean(worse))


def frechet(features: np.ndarray, reference: np.ndarray) -> float:
    """Frechet distance of two Gaussians fitted to features (n, d), (m, d) (Heusel et al., arXiv 1706.08500, section 4).

    |mu - mu'|^2 + tr(C + C' - 2 (C C')^(1/2)).  The last trace is the nuclear norm of A B^T for
    the centred features A and B over sqrt(n - 1): no square root of a matrix is taken.
    """
    if not np.isfinite(features).all():
        return float("nan")
    one, other = (_centred(each) for each in (features, reference))
    shift = features.mean(0) - reference.mean(0)
    overlap = np.linalg.norm(_reduced(one) @ _reduced(other).T, "nuc")
    return float(shift @ shift + (one**2).sum() + (other**2).sum() - 2 * overlap)


def distance_of_sets(features: np.ndarray, reference: np.ndarray) -> Estimate:
    """`frechet`, and its error over the samples, the reference being given."""
    return jackknife(len(features), lambda kept: frechet(features[kept], reference))


def relative_loss_of_sets(cached: np.ndarray, uncached: np.ndarray, reference: np.ndarray) -> Estimate | None:
    """How much farther from the reference cached samples are than uncached ones of the same noise.

    As a part of the uncached distance; None where that is zero.
    """
    if len(uncached) < 3 or frechet(uncached, reference) <= 0:
        return None

    def loss(kept: np.ndarray) -> float:
        floor = frechet(uncached[kept], reference)
        return (frechet(cached[kept], reference) - floor) / floor

    return jackknife(len(cached), loss)


def jackknife(count: int, statistic: Callable[[np.ndarray], float]) -> Estimate:
    """A statistic of all samples, and its delete-a-group jackknife error (Efron and Stein, 1981).

    Args:
        count: number of samples.
        statistic: of the samples with these numbers.
    """
    every = np.arange(count)
    groups = min(GROUPS, count)
    if groups < 3:
        return _estimate(statistic(every), None)
    left_out = np.array([statistic(every[every % groups != group]) for group in range(groups)])
    spread = (groups - 1) / groups * ((left_out - left_out.mean()) ** 2).sum()
    return _estimate(statistic(every), float(spread**0.5))


def verdict(macs_reduction: float, speedup: float, losses: list[Estimate], samples: int) -> Verdict:
    """Whether a budget meets the target: twice as fast, half of the MACs, at most 1 % of loss in all that counts.

    The estimates decide; whether errors could turn it is told by a question mark.  Where no
    sample differs there is no error to be seen, and three out of so many samples stand for it
    (the rule of three).
    """
    if not losses:
        return "unknown"
    if min(macs_reduction, speedup) < TARGET_REDUCTION or any(loss.value is None for loss in losses):
        return "fail"
    margins = [
        (loss.value - TARGET_LOSS, SURE * loss.error if loss.error else 3 / samples)
        for loss in losses
        if loss.value is not None
    ]
    if all(over <= 0 for over, _ in margins):
        return "pass" if all(over + doubt <= 0 for over, doubt in margins) else "pass?"
    return "fail" if any(over - doubt > 0 for over, doubt in margins) else "fail?"


def _estimate(value: float, error: float | None) -> Estimate:
    return Estimate(value, error) if np.isfinite(value) else Estimate(None, None)


def _error_of_mean(values: np.ndarray) -> float | None:
    return float(values.std(ddof=1) / len(values) ** 0.5) if len(values) > 1 else None


def _centred(features: np.ndarray) -> np.ndarray:
    """Rows whose Gram matrix is the covariance."""
    return (features - features.mean(0)) / max(len(features) - 1, 1) ** 0.5


def _reduced(rows: np.ndarray) -> np.ndarray:
    """At most as many rows as columns, with the same covariance."""
    reduced: np.ndarray = np.linalg.qr(rows, mode="r") if len(rows) > rows.shape[1] else rows  # type: ignore[assignment]
    return reduced
