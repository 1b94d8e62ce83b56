"""Small changes of a schedule, and descent by them."""

from collections.abc import Callable, Sequence

import numpy as np

from recache_compile.ir.schedule import Schedule

Score = Callable[[Sequence[Schedule]], np.ndarray]
"""The values of schedules (schedules,), lower is better."""


def relocations(schedule: Schedule) -> list[Schedule]:
    """All schedules with one recompute step moved to a cached one; step 0 stays."""
    steps = schedule.recompute_steps
    free = [step for step in range(schedule.num_steps) if step not in steps]
    return [
        Schedule((*steps[:place], *steps[place + 1 :], to), schedule.num_steps)
        for place in range(1, len(steps))
        for to in free
    ]


def descend(start: Schedule, score: Score) -> tuple[Schedule, float]:
    """Relocate one step at a time, the best of all moves first, until none is better.

    Returns:
        The local minimum and its score.
    """
    best, lowest = start, float(score([start])[0])
    while moves := relocations(best):
        scores = score(moves)
        first = int(scores.argmin())
        if not scores[first] < lowest:
            break
        best, lowest = moves[first], float(scores[first])
    return best, lowest


def random_schedule(num_steps: int, budget: int, random: np.random.Generator) -> Schedule:
    """Step 0 and `budget - 1` others, all sets equally likely."""
    others = random.choice(np.arange(1, num_steps), budget - 1, replace=False)
    return Schedule((0, *(int(step) for step in others)), num_steps)
