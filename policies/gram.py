"""Search on the Gram surrogate: needs a handful of uncached generations and no training."""

from dataclasses import dataclass

import numpy as np

from recache_compile.ir.schedule import Schedule
from recache_compile.policies.base import Problem, check_options
from recache_compile.policies.front_loaded import FrontLoaded
from recache_compile.policies.moves import descend, random_schedule
from recache_compile.policies.surrogate import Surrogate
from recache_compile.policies.uniform import Uniform


@dataclass(frozen=True, slots=True)
class Gram:
    """The best local minimum of the surrogate error, from several starts.

    Args:
        starts: random starts, beside uniform and front-loaded ones.
    """

    starts: int = 6

    def __post_init__(self) -> None:
        check_options("gram", {"starts": 0}, self)

    def schedule(self, problem: Problem, budget: int) -> Schedule:
        """The schedule with the smallest surrogate error that was found.

        Raises:
            ScheduleError: there is no calibration.
        """
        return self.minima(problem, budget)[0][0]

    def minima(self, problem: Problem, budget: int) -> list[tuple[Schedule, float]]:
        """The distinct local minima that were found, best first, with their surrogate errors."""
        surrogate = Surrogate(problem.need_calibration("gram"), problem.need_forecaster("gram"))
        random = np.random.default_rng((problem.seed, budget))
        starts = [
            Uniform().schedule(problem, budget),
            FrontLoaded().schedule(problem, budget),
            FrontLoaded(power=0.7).schedule(problem, budget),
            *(random_schedule(problem.num_steps, budget, random) for _ in range(self.starts)),
        ]
        found = dict(descend(start, surrogate.errors) for start in starts)
        return sorted(found.items(), key=lambda item: (item[1], item[0].recompute_steps))
