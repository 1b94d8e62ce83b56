"""Recompute steps that thin out along the loop."""

from dataclasses import dataclass
from math import isfinite
from typing import ClassVar

from recache_compile.errors import ScheduleError
from recache_compile.ir.schedule import Schedule
from recache_compile.policies.base import Problem


@dataclass(frozen=True, slots=True)
class FrontLoaded:
    """Step number i of k lies at T (i / k)^power, moved on where two would coincide.

    Args:
        power: 1 is uniform; larger values put more steps at the start.
    """

    power: float = 1.5
    for_any_length: ClassVar[bool] = True

    def schedule(self, problem: Problem, budget: int) -> Schedule:
        """Exactly `budget` distinct steps.

        Raises:
            ScheduleError: the power is not a positive number.
        """
        if not (isfinite(self.power) and self.power > 0):
            raise ScheduleError(f"policy front-loaded: power {self.power} is not a positive number")
        total = problem.num_steps
        steps: list[int] = []
        for index in range(budget):
            wanted = int(total * (index / budget) ** self.power)
            earliest = steps[-1] + 1 if steps else 0
            steps.append(min(max(wanted, earliest), total - budget + index))
        return Schedule(tuple(steps), total)
