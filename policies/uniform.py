"""Evenly spread recompute steps, after an optional warm-up."""

from dataclasses import dataclass
from typing import ClassVar

from recache_compile.errors import ScheduleError
from recache_compile.ir.schedule import Schedule
from recache_compile.policies.base import Problem


@dataclass(frozen=True, slots=True)
class Uniform:
    """The first `warmup` steps, then equal gaps to the end of the loop.

    With three warm-up steps this is TaylorSeer's schedule (arXiv 2503.06923): T = 50 and
    k = 10 give 0, 1, 2, 8, 14, 20, 26, 32, 38, 44.

    Args:
        warmup: number of steps at the start that are all recomputed, at least 1.
    """

    warmup: int = 1
    for_any_length: ClassVar[bool] = True

    def schedule(self, problem: Problem, budget: int) -> Schedule:
        """Gaps differ by at most one step.

        Raises:
            ScheduleError: the budget is smaller than the warm-up.
        """
        if not 1 <= self.warmup <= budget:
            raise ScheduleError(f"policy uniform: warm-up of {self.warmup} steps does not fit budget {budget}")
        last = self.warmup - 1
        spread = budget - last
        steps = [last + part * (problem.num_steps - last) // spread for part in range(spread)]
        return Schedule((*range(last), *steps), problem.num_steps)
