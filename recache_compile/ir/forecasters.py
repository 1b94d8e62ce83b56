"""Forecasters as coefficient tables.

Every forecaster here is linear in the anchors' features: F(t) = sum_j w_j * F(a_j).  The
weights depend on positions alone, so they are computed at compile time in float64 and one
forecast program serves all forecasters.  They are found by running the forecaster's own
recursion on unit vectors.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import factorial
from typing import Protocol

import numpy as np
from numpy.polynomial import hermite

from recache_compile.errors import ScheduleError


class Forecaster(Protocol):
    """A rule that maps anchors to coefficients."""

    @property
    def name(self) -> str:
        """The name users choose it by."""
        ...

    @property
    def order(self) -> int:
        """Polynomial order m; the history holds the last m + 1 anchors."""
        ...

    def coefficients(self, anchors: Sequence[float], position: float) -> tuple[float, ...]:
        """Weights of the anchors' features, newest first.

        Args:
            anchors: positions of the held recompute steps, ascending, at most m + 1; fewer
                while the history warms up, which lowers the order.
            position: where the features are wanted, beyond the newest anchor.
        """
        ...


def backward_differences(anchors: Sequence[float]) -> list[np.ndarray]:
    """Difference quotients D^0..D^m at the newest anchor, as weights newest first.

    D^(i+1)_n = (D^i_n - D^i_(n-1)) / (a_n - a_(n-1)): the newest gap at every order, as
    TaylorSeer defines and releases it (arXiv 2503.06923, equation 8).
    """
    count = len(anchors)
    previous: list[np.ndarray] = []
    for number, features in enumerate(np.eye(count)):
        current = [features]
        for order, older in enumerate(previous):
            current.append((current[order] - older) / (anchors[number] - anchors[number - 1]))
        previous = current
    return [difference[::-1] for difference in previous]


@dataclass(frozen=True, slots=True)
class Reuse:
    """The newest anchor as it is (FORA, arXiv 2407.01425)."""

    order: int = 0
    name: str = "reuse"

    def coefficients(self, anchors: Sequence[float], position: float) -> tuple[float, ...]:
        """One for the newest anchor, zero for the others."""
        return (1.0, *(0.0,) * (len(anchors) - 1))


@dataclass(frozen=True, slots=True)
class Taylor:
    """Truncated Taylor series on difference quotients (TaylorSeer, arXiv 2503.06923, equation 9)."""

    order: int = 1
    name: str = "taylor"

    def coefficients(self, anchors: Sequence[float], position: float) -> tuple[float, ...]:
        """sum_i x^i / i! * D^i with x = position - newest anchor."""
        x = position - anchors[-1]
        terms = enumerate(backward_differences(anchors))
        return _as_tuple(sum((x**i / factorial(i) * difference for i, difference in terms), np.zeros(len(anchors))))


@dataclass(frozen=True, slots=True)
class HiCache:
    """Taylor's recursion with a scaled Hermite basis (HiCache, arXiv 2508.16984).

    x^i becomes sigma^i H_i(sigma x) with the physicists' Hermite polynomials, evaluated at
    +x.  Order 1 with sigma = 0.5 is Taylor of order 1 with half the slope.
    """

    order: int = 2
    sigma: float = 0.5
    name: str = "hicache"

    def coefficients(self, anchors: Sequence[float], position: float) -> tuple[float, ...]:
        """sum_i sigma^i H_i(sigma x) / i! * D^i with x = position - newest anchor."""
        x = position - anchors[-1]
        total = np.zeros(len(anchors))
        for i, difference in enumerate(backward_differences(anchors)):
            basis = float(hermite.hermval(self.sigma * x, [0.0] * i + [1.0]))
            total = total + self.sigma**i * basis / factorial(i) * difference
        return _as_tuple(total)


@dataclass(frozen=True, slots=True)
class Newton:
    """Exact polynomial extrapolation on the non-uniform grid (Newton's or Lagrange's form)."""

    order: int = 1
    name: str = "newton"

    def coefficients(self, anchors: Sequence[float], position: float) -> tuple[float, ...]:
        """Lagrange's basis polynomials at `position`."""
        weights = [
            float(np.prod([(position - other) / (anchor - other) for other in anchors if other != anchor]))
            for anchor in anchors
        ]
        return tuple(reversed(weights))


@dataclass(frozen=True, slots=True)
class Fitted:
    """Least squares on what was seen: the best linear forecast of the calibration set for the same history.

    w = (G_aa + ridge * mean(diag G_aa) * I)^-1 G_at with the Gram matrix G of the features.

    Args:
        gram: (T, T) inner products of the features of every two steps, summed over samples.
        order: history depth less one.
        ridge: regularisation, relative to the mean diagonal of G_aa.
        name: the name users choose it by.
    """

    gram: tuple[tuple[float, ...], ...]
    order: int = 1
    ridge: float = 1e-6
    name: str = "fitted"

    def coefficients(self, anchors: Sequence[float], position: float) -> tuple[float, ...]:
        """The regularised solution for these anchors; positions are step numbers."""
        held = [int(anchor) for anchor in reversed(anchors)]
        among = np.array([[self.gram[one][other] for other in held] for one in held])
        target = np.array([self.gram[one][int(position)] for one in held])
        damping = self.ridge * among.trace() / len(held) * np.eye(len(held))
        return _as_tuple(np.linalg.solve(among + damping, target))

    def interpolated(self, weights: np.ndarray) -> "Fitted":
        """The same for steps between those that were seen, whose features are taken as these weighted means.

        Args:
            weights: (steps, T), as of `interpolation`.
        """
        between = weights @ np.asarray(self.gram) @ weights.T
        return replace(self, gram=tuple(map(tuple, between.tolist())))


def _as_tuple(weights: np.ndarray) -> tuple[float, ...]:
    return tuple(float(weight) for weight in weights)


FORECASTERS = {"reuse": Reuse, "taylor": Taylor, "hicache": HiCache, "newton": Newton}
"""By name; `fitted` is made of a calibration."""


def check_forecaster(name: str, order: int | None) -> None:
    """Raise `ScheduleError` unless there is a forecaster of this name, and the order is none that cannot be."""
    if name not in (*FORECASTERS, "fitted"):
        raise ScheduleError(f"forecaster {name!r} is unknown; choose one of {', '.join((*FORECASTERS, 'fitted'))}")
    if order is not None and order < 0:
        raise ScheduleError(f"order {order}: expected 0 or more")


def anchors_of(name: str, order: int) -> int:
    """How many past recompute steps a forecaster reads at most: m + 1; `reuse` has no order and reads one."""
    return 1 if name == "reuse" else order + 1


def get_forecaster(name: str, order: int | None = None, gram: Sequence[Sequence[float]] | None = None) -> Forecaster:
    """The forecaster of that name; without `order`, of its own default order.  `reuse` has none.

    Args:
        name: a key of `FORECASTERS`, or "fitted".
        order: polynomial order m.
        gram: of the features, for `fitted`.

    Raises:
        ScheduleError: unknown name, negative order, or nothing that `fitted` could be fitted to.
    """
    check_forecaster(name, order)
    if name == "fitted":
        if gram is None:
            raise ScheduleError(
                "forecaster fitted: needs a few uncached generations of the model; compile a pipeline, not a module"
            )
        return Fitted(tuple(tuple(float(each) for each in row) for row in gram), 1 if order is None else order)
    if name == "reuse" or order is None:
        return FORECASTERS[name]()
    return FORECASTERS[name](order=order)
