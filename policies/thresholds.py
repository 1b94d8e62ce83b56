"""Online rules with a threshold, run offline: the threshold is set so that the budget comes out.

Both rules add up an estimated error since the newest recompute step and recompute once it
reaches the threshold delta.  Offline that is a table of the value at every step for every
newest recompute step, and delta matters only where it passes an entry of the table: delta is
bisected over these to the smallest that takes no more than the budget.  With ties one entry
can cost several steps at once.  The steps still missing are then added one by one, each time
the cached step with the largest value, the earliest of equals.
"""

from bisect import bisect_left
from dataclasses import dataclass
from math import inf

import numpy as np

from recache_compile.errors import ScheduleError
from recache_compile.ir.schedule import Schedule
from recache_compile.policies.base import Problem


@dataclass(frozen=True, slots=True)
class TeaCache:
    """Sum of relative L1 changes since the newest recompute step (arXiv 2411.19108, equation 6).

    The paper estimates the changes of the model's output from its modulated input with a
    polynomial fitted to a model; here they are those measured in the calibration.  The
    released code also recomputes the last step, which the budget does not force here.
    """

    def schedule(self, problem: Problem, budget: int) -> Schedule:
        """Exactly `budget` steps, as this file's head says."""
        changes = problem.need_calibration("teacache").changes
        accumulated = np.zeros((problem.num_steps, problem.num_steps))
        for newest, row in enumerate(accumulated):
            row[newest + 1 :] = changes[newest + 1 :].cumsum()
        return Schedule(_spend(accumulated, budget), problem.num_steps)


@dataclass(frozen=True, slots=True)
class MagCache:
    """Sum of |1 - product of magnitude ratios| since the newest recompute step (arXiv 2506.09045).

    The released code also keeps a first part of the loop, 20 %, which is not forced here.

    Args:
        skips: most cached steps in a row, the paper's K; 0 for no such limit.
    """

    skips: int = 0

    def schedule(self, problem: Problem, budget: int) -> Schedule:
        """Exactly `budget` steps, as this file's head says.

        Raises:
            ScheduleError: so few steps leave more than `skips` cached ones in a row, or
                `skips` is negative.
        """
        total = problem.num_steps
        if self.skips < 0:
            raise ScheduleError(f"policy magcache: skips {self.skips}: expected 0 or more")
        if self.skips and budget * (self.skips + 1) < total:
            raise ScheduleError(
                f"policy magcache: budget {budget} leaves more than {self.skips} cached steps in a row"
                f" on {total} steps; allow more skips"
            )
        ratios = problem.need_calibration("magcache").ratios
        accumulated = np.zeros((total, total))
        for newest, row in enumerate(accumulated):
            row[newest + 1 :] = np.abs(1 - ratios[newest + 1 :].cumprod()).cumsum()
            if self.skips:
                row[newest + self.skips + 1 :] = inf
        return Schedule(_spend(accumulated, budget), total)


def _spend(accumulated: np.ndarray, budget: int) -> tuple[int, ...]:
    """The recompute steps of the rule with that budget.

    Args:
        accumulated: (T, T), the rule's value at a step (column) since a recompute step (row).
        budget: number of steps.
    """
    thresholds = [*np.unique(accumulated[np.triu_indices(len(accumulated), 1)]), inf]
    found = bisect_left(thresholds, -budget, key=lambda threshold: -len(_replay(accumulated, threshold)))
    steps = _replay(accumulated, thresholds[found])
    while len(steps) < budget:
        steps = sorted([*steps, _most_due(accumulated, steps)])
    return tuple(steps)


def _replay(accumulated: np.ndarray, threshold: float) -> list[int]:
    steps = [0]
    for step in range(1, len(accumulated)):
        if accumulated[steps[-1], step] >= threshold:
            steps.append(step)
    return steps


def _most_due(accumulated: np.ndarray, steps: list[int]) -> int:
    every = np.arange(len(accumulated))
    newest = np.array(steps)[np.searchsorted(steps, every, side="right") - 1]
    values = accumulated[newest, every]
    values[steps] = -inf
    return int(values.argmax())
