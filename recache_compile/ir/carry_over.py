"""What was found for one loop, for a loop of another length: steps correspond by noise level."""

from collections.abc import Sequence

import numpy as np

from recache_compile.ir.schedule import Schedule

Levels = Sequence[float]
"""Noise level of every step; empty where it is not known."""


def carry_over(schedule: Schedule, budget: int, num_steps: int, levels: Levels = (), others: Levels = ()) -> Schedule:
    """A schedule of a loop of another length: each recompute step goes to the step that is nearest in noise level.

    Steps that would coincide move on.  Where the budget is larger than that of the schedule,
    the widest gaps are halved.

    Args:
        schedule: of the one loop; at most `budget` steps.
        budget: recompute steps k of the other loop, at most its length.
        num_steps: length of the other loop.
        levels: of the one loop.
        others: of the other one; where either is unknown, a step counts by its share of the loop.
    """
    before, after = _places(schedule.num_steps, num_steps, levels, others)
    steps: list[int] = []
    for number, step in enumerate(schedule.recompute_steps):
        nearest = int(np.abs(after - before[step]).argmin())
        earliest = steps[-1] + 1 if steps else 0
        steps.append(min(max(nearest, earliest), num_steps - schedule.budget + number) if number else 0)
    while len(steps) < budget:
        ends = [*steps[1:], num_steps]
        width, start = max((end - start, -start) for start, end in zip(steps, ends, strict=True))
        steps = sorted((*steps, width // 2 - start))
    return Schedule(tuple(steps), num_steps)


def interpolation(num_steps: int, wanted: int, levels: Levels = (), others: Levels = ()) -> np.ndarray:
    """Weights (wanted, T) that interpolate what is known at the steps of one loop at those of another."""
    before, after = _places(num_steps, wanted, levels, others)
    order = np.argsort(before, kind="stable")
    columns = np.eye(num_steps)[:, order]
    return np.stack([np.interp(after, before[order], column) for column in columns], 1)


def _places(one: int, other: int, levels: Levels, others: Levels) -> tuple[np.ndarray, np.ndarray]:
    """Where the steps of two loops lie on one axis."""
    if len(levels) == one and len(others) == other:
        return np.asarray(levels, dtype=float), np.asarray(others, dtype=float)
    return 1 - np.arange(one) / one, 1 - np.arange(other) / other
