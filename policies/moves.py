"""Small changes of a schedule, and climbing by them."""

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


def climb(start: Schedule, better: Callable[[Schedule], Schedule | None]) -> Schedule:
    """Hill climbing: go on to a better schedule until none is known.

    Args:
        start: where the climb begins.
        better: tries what is near a schedule, in its own order, and gives one that it accepts.

    Returns:
        The schedule for which `better` gives none.
    """
    while (found := better(start)) is not None:
        start = found
    return start


def descend(start: Schedule, score: Score) -> tuple[Schedule, float]:
    """Relocate one step at a time, the best of all moves first, until none is better.

    Returns:
        The local minimum and its score.
    """
    lowest = float(score([start])[0])

    def better(schedule: Schedule) -> Schedule | None:
        nonlocal lowest
        moves = relocations(schedule)
        scores = score(moves) if moves else np.array([np.inf])
        first = int(scores.argmin())
        if not scores[first] < lowest:
            return None
        lowest = float(scores[first])
        return moves[first]

    return climb(start, better), lowest


def random_schedule(num_steps: int, budget: int, random: np.random.Generator) -> Schedule:
    """Step 0 and `budget - 1` others, all sets equally likely."""
    others = random.choice(np.arange(1, num_steps), budget - 1, replace=False)
    return Schedule((0, *(int(step) for step in others)), num_steps)
