"""Simulated annealing on the true loss, then hill climbing."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from math import exp

import numpy as np

from recache_compile.errors import ScheduleError
from recache_compile.ir.schedule import Schedule
from recache_compile.policies.base import Objective, Problem
from recache_compile.policies.moves import climb, relocations
from recache_compile.policies.uniform import Uniform


@dataclass(frozen=True, slots=True)
class Annealing:
    """Moves one recompute step at a time, at a fixed price (BudCache, arXiv 2606.13496).

    The search starts from `Uniform`.  Every distinct schedule that is run, on all training
    samples, counts as one evaluation.  It stops early where no single move helps any more.

    Args:
        evaluations: schedules run at most, the first one included.
        share: part of them for annealing; the rest is for hill climbing from the best.
        temperature: at the start, relative to the size of the first loss.
        cooling: last temperature relative to the first; geometric in between.
    """

    evaluations: int = 200
    share: float = 0.7
    temperature: float = 0.1
    cooling: float = 0.01

    def schedule(self, problem: Problem, budget: int) -> Schedule:
        """The best schedule that was run; the same for the same seed and budget.

        Raises:
            ScheduleError: there is no objective, or an option is out of range.
        """
        self._check()
        losses = KnownLosses(problem.need_objective("annealing"))
        start = Uniform().schedule(problem, budget)
        if budget in (1, problem.num_steps):
            return start
        random = np.random.default_rng((problem.seed, budget))
        proposals = int(self.share * (self.evaluations - 1))
        hottest = self.temperature * abs(losses.of(start))
        anneal(losses, start, (hottest * self.cooling ** (number / proposals) for number in range(proposals)), random)
        return climb(losses.best(), partial(better_neighbour, losses, self.evaluations, random))

    def _check(self) -> None:
        if self.evaluations < 1:
            raise ScheduleError(f"policy annealing: evaluations {self.evaluations}: expected at least 1")
        if not 0 <= self.share <= 1:
            raise ScheduleError(f"policy annealing: share {self.share}: expected a number from 0 to 1")
        if not (self.temperature >= 0 and 0 < self.cooling <= 1):
            raise ScheduleError(
                f"policy annealing: temperature {self.temperature} and cooling {self.cooling}: expected at least 0"
                " and a number above 0 up to 1"
            )


@dataclass(slots=True)
class KnownLosses:
    """Mean training losses; each schedule is run once."""

    objective: Objective
    known: dict[Schedule, float] = field(default_factory=dict)

    def of(self, schedule: Schedule) -> float:
        """The loss of one schedule."""
        if schedule not in self.known:
            self.known[schedule] = float(self.objective.losses([schedule], self.objective.training).mean())
        return self.known[schedule]

    def best(self) -> Schedule:
        """The best schedule so far, the first of equals."""
        return min(self.known, key=self.known.__getitem__)


def anneal(losses: KnownLosses, schedule: Schedule, temperatures: Iterable[float], random: np.random.Generator) -> None:
    """One random move a temperature: taken where it helps, else with probability exp(-rise / temperature)."""
    for temperature in temperatures:
        neighbours = relocations(schedule)
        moved = neighbours[int(random.integers(len(neighbours)))]
        rise = losses.of(moved) - losses.of(schedule)
        if rise <= 0 or (temperature > 0 and random.random() < exp(-rise / temperature)):
            schedule = moved


def better_neighbour(
    losses: KnownLosses, evaluations: int, random: np.random.Generator, schedule: Schedule
) -> Schedule | None:
    """The first relocation in random order that helps; None when none does or `evaluations` schedules are known."""
    neighbours = relocations(schedule)
    for index in random.permutation(len(neighbours)):
        neighbour = neighbours[index]
        if neighbour not in losses.known and len(losses.known) >= evaluations:
            return None
        if losses.of(neighbour) < losses.of(schedule):
            return neighbour
    return None
