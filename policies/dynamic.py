"""Exact dynamic programming over errors that belong to the gaps between recompute steps."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations
from math import comb

import numpy as np

from recache_compile.errors import ScheduleError
from recache_compile.ir.forecasters import Forecaster
from recache_compile.ir.schedule import Schedule
from recache_compile.policies.base import Calibration, Problem

NONE = -1
"""In a history: no such anchor yet."""

MOST_FORECASTS = 10_000_000
"""Forecasts in a table beyond which its errors take hours instead of seconds."""

Combine = Callable[[np.ndarray, np.ndarray], np.ndarray]


@dataclass(frozen=True, slots=True)
class DynamicProgram:
    """The least sum of the segments' errors (DPCache, arXiv 2602.22654).

    A segment runs from a recompute step to the next one, or to the end of the loop; its
    error is the sum over its cached steps t of sqrt(mean over samples of ||F̂_t - F_t||²).
    As in the paper's path-aware cost tensor, the error is that of the history in use; here
    it holds all m + 1 anchors, so the optimum is exact for any order m.  Errors are those
    of features on an uncached trajectory: they neither grow nor cancel along the loop.
    """

    def schedule(self, problem: Problem, budget: int) -> Schedule:
        """The optimum of exactly `budget` steps."""
        segments = _segments(problem, "dp")
        return Schedule(cheapest(segments, segments.errors, np.add, budget), problem.num_steps)


@dataclass(frozen=True, slots=True)
class Minimax:
    """The least largest segment error; among equals, the least sum (LeMiCa, arXiv 2511.00090).

    The paper weighs a segment by the change of the final image when that segment alone is
    cached, which takes a generation a segment; here it is the error of `DynamicProgram`,
    which takes none.  The paper goes on to the second largest error where this takes the sum.
    """

    def schedule(self, problem: Problem, budget: int) -> Schedule:
        """The optimum of exactly `budget` steps."""
        segments = _segments(problem, "minimax")
        steps = cheapest(segments, segments.errors, np.maximum, budget)
        bounded = np.where(segments.errors <= segments.largest(steps), segments.errors, np.inf)
        return Schedule(cheapest(segments, bounded, np.add, budget), problem.num_steps)


@dataclass(frozen=True, slots=True, eq=False)
class Segments:
    """The error of every segment under every history.

    Args:
        histories: H tuples of m + 1 anchors, oldest first and `NONE` where there is none
            yet, ordered by all but their oldest anchor.
        errors: (H, T + 1), of the segment from the newest anchor to a next recompute step, T
            for the end of the loop; infinite where that is not later.
    """

    histories: tuple[tuple[int, ...], ...]
    errors: np.ndarray

    def largest(self, steps: tuple[int, ...]) -> float:
        """The largest segment error of a schedule."""
        length = len(self.histories[0])
        rows = {history: row for row, history in enumerate(self.histories)}
        padded = (*(NONE,) * (length - 1), *steps)
        ends = (*steps[1:], self.errors.shape[1] - 1)
        return max(float(self.errors[rows[padded[number : number + length]], end]) for number, end in enumerate(ends))


@lru_cache(maxsize=1)
def segment_errors(calibration: Calibration, forecaster: Forecaster) -> Segments:
    """All segments of a loop; one table serves every budget and both policies.

    Raises:
        ScheduleError: the forecaster's order makes too many histories.
    """
    total, length = calibration.num_steps, forecaster.order + 1
    if comb(total, length + 1) > MOST_FORECASTS:
        raise ScheduleError(
            f"dynamic programming: order {forecaster.order} on {total} steps has {comb(total, length)} histories;"
            " choose a lower order or another policy, such as annealing"
        )
    warming_up = [
        (*(NONE,) * (length - held), 0, *later)
        for held in range(1, length)
        for later in combinations(range(1, total), held - 1)
    ]
    histories = sorted([*warming_up, *combinations(range(total), length)], key=lambda history: history[1:])
    gram = calibration.features.mean(axis=0)
    errors = np.array([_errors_after(gram, forecaster, history) for history in histories])
    return Segments(tuple(histories), errors)


def cheapest(segments: Segments, errors: np.ndarray, combine: Combine, budget: int) -> tuple[int, ...]:
    """The recompute steps, `budget` of them, whose combined segment errors are least.

    Dynamic programming on the number of steps so far and the history held: a step appends
    to the history and drops its oldest anchor, so histories with one tail lead to the same.

    Args:
        segments: the histories.
        errors: of their segments (H, T + 1).
        combine: of the errors so far and that of one more segment; does not fall in either.
        budget: number of recompute steps.
    """
    histories = segments.histories
    newest = np.array([history[-1] for history in histories])
    firsts = [row for row, history in enumerate(histories) if row == 0 or history[1:] != histories[row - 1][1:]]
    group_of = {histories[first][1:]: group for group, first in enumerate(firsts)}
    # the history of step 0 alone follows none, and no segment ends at step 0: any group gives infinity
    group = np.array([group_of.get(history[:-1], 0) for history in histories])
    start = (*(NONE,) * (len(histories[0]) - 1), 0)
    layers = [np.where([history == start for history in histories], 0.0, np.inf)]
    for _ in range(budget - 1):
        reached = combine(layers[-1][:, None], errors)
        layers.append(np.minimum.reduceat(reached, firsts, axis=0)[group, newest])
    row = int(combine(layers[-1], errors[:, -1]).argmin())
    steps = [int(newest[row])]
    bounds = [*firsts, len(histories)]
    for values in reversed(layers[:-1]):
        before = slice(bounds[group[row]], bounds[group[row] + 1])
        row = before.start + int(combine(values[before], errors[before, steps[-1]]).argmin())
        steps.append(int(newest[row]))
    return tuple(reversed(steps))


def _segments(problem: Problem, policy: str) -> Segments:
    calibration, forecaster = problem.need_calibration(policy), problem.need_forecaster(policy)
    return segment_errors(calibration, forecaster)  # type: ignore[arg-type]  # forecasters are frozen: they hash


def _errors_after(gram: np.ndarray, forecaster: Forecaster, history: tuple[int, ...]) -> np.ndarray:
    """Errors (T + 1,) of the segments that follow a history, from the mean Gram matrix (T, T)."""
    total = len(gram)
    anchors = [anchor for anchor in history if anchor != NONE]
    newest_first = anchors[::-1]
    later = range(anchors[-1] + 1, total)
    errors = np.full(total + 1, np.inf)
    errors[anchors[-1] + 1] = 0.0
    if later:
        weights = np.array([forecaster.coefficients(anchors, step) for step in later])
        within = ((weights @ gram[np.ix_(newest_first, newest_first)]) * weights).sum(axis=1)
        across = (weights * gram[np.ix_(later, newest_first)]).sum(axis=1)
        squared = within - 2 * across + gram[later, later]
        errors[anchors[-1] + 2 :] = np.sqrt(squared.clip(min=0.0)).cumsum()
    return errors
