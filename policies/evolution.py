"""Evolution of the whole trade-off between compute and loss."""

from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np

from recache_compile.errors import RuntimeUnavailableError, ScheduleError
from recache_compile.ir.schedule import Schedule
from recache_compile.policies.base import Objective, Problem
from recache_compile.policies.uniform import Uniform

REACH = 2
"""`schedule` lets budgets this far from the asked one take part, as partners and stepping stones."""


@dataclass(frozen=True, slots=True)
class Nsga2:
    """NSGA-II on schedules as 0/1 masks (ECAD, arXiv 2506.15682).

    Two objectives: the number of recompute steps, to which the MACs of the loop are
    proportional up to the cached steps' few, and the mean training loss.  The paper has a
    bit for every block and component of every step; here all of a step is recomputed or
    none.  Step 0 is no variable.  Offspring of a budget that is not searched get or lose
    random steps until they have the nearest that is.

    Args:
        population: number of schedules kept.
        generations: how often there are as many new ones; together they bound the schedules
            asked.  At the start there is at least one of each budget, `Uniform`.
    """

    population: int = 24
    generations: int = 16

    def schedule(self, problem: Problem, budget: int) -> Schedule:
        """The best schedule asked of exactly this budget, in a search of those at most two away.

        It need not be on the Pareto front, where a smaller budget may do better.

        Raises:
            ScheduleError: there is no objective, or an option is out of range.
            RuntimeUnavailableError: pymoo is not installed.
        """
        if budget in (1, problem.num_steps):
            problem.need_objective("nsga2")
            return Uniform().schedule(problem, budget)
        nearby = range(max(1, budget - REACH), min(problem.num_steps, budget + REACH) + 1)
        losses = self._search(problem, nearby)
        return min((schedule for schedule in losses if schedule.budget == budget), key=losses.__getitem__)

    def front(self, problem: Problem, budgets: Sequence[int]) -> tuple[tuple[Schedule, float], ...]:
        """The Pareto front of a search of these budgets: rising budgets with strictly falling losses.

        Raises:
            ScheduleError: there is no objective, or an option is out of range.
            RuntimeUnavailableError: pymoo is not installed.
        """
        losses = self._search(problem, budgets)
        front: list[tuple[Schedule, float]] = []
        for schedule in sorted(losses, key=lambda schedule: (schedule.budget, losses[schedule])):
            if not front or losses[schedule] < front[-1][1]:
                front.append((schedule, losses[schedule]))
        return tuple(front)

    def _search(self, problem: Problem, budgets: Sequence[int]) -> dict[Schedule, float]:
        """The mean training losses of all schedules asked."""
        if self.population < 2 or self.generations < 1:
            raise ScheduleError(
                f"policy nsga2: population {self.population} and generations {self.generations}: expected at least"
                " 2 and 1"
            )
        objective = problem.need_objective("nsga2")
        pymoo = _pymoo()
        variables = pymoo.Problem(n_var=problem.num_steps - 1, n_obj=2, xl=0, xu=1, vtype=bool)
        algorithm = pymoo.NSGA2(
            pop_size=self.population,
            sampling=_first_masks(problem, budgets, self.population),
            crossover=pymoo.TwoPointCrossover(),
            mutation=pymoo.BitflipMutation(),
            repair=NearestBudget(tuple(budgets), np.random.default_rng((problem.seed, 1))),
        )
        algorithm.setup(variables, seed=problem.seed, termination=pymoo.NoTermination())
        losses: dict[Schedule, float] = {}
        for _ in range(self.generations):
            asked = algorithm.ask()
            if asked is None:  # every mask in reach is known
                break
            schedules = [Schedule.from_mask([1, *mask.astype(int)]) for mask in asked.get("X")]
            _ask(objective, schedules, losses)
            values = np.array([(schedule.budget, losses[schedule]) for schedule in schedules])
            pymoo.Evaluator().eval(pymoo.StaticProblem(variables, F=values), asked)
            algorithm.tell(infills=asked)
        return losses


@dataclass(frozen=True, slots=True)
class NearestBudget:
    """A repair operator in pymoo's sense: random steps are added or dropped up to the nearest budget.

    Args:
        budgets: those allowed.
        random: chooses the steps; old versions of pymoo hand none to operators.
    """

    budgets: tuple[int, ...]
    random: np.random.Generator

    def __call__(self, problem: Any, population: Any, **_: Any) -> Any:
        """The population, its masks repaired; pymoo names the arguments."""
        population.set("X", np.array([self.repaired(mask) for mask in population.get("X")]))
        return population

    def repaired(self, mask: np.ndarray) -> np.ndarray:
        """A mask (T - 1,) of steps 1..T-1 with an allowed number of steps, step 0 counted."""
        present = 1 + int(mask.sum())
        wanted = min(self.budgets, key=lambda budget: abs(budget - present))
        changed = self.random.permutation(np.flatnonzero(mask == (present > wanted)))[: abs(present - wanted)]
        repaired = mask.copy()
        repaired[changed] = ~mask[changed]
        return repaired


def _first_masks(problem: Problem, budgets: Sequence[int], population: int) -> np.ndarray:
    """Masks (count, T - 1): `Uniform` of each budget, then random ones of the budgets in turn."""
    random = np.random.default_rng(problem.seed)
    masks = np.zeros((max(population, len(budgets)), problem.num_steps - 1), dtype=bool)
    for number, mask in enumerate(masks):
        budget = budgets[number % len(budgets)]
        if number < len(budgets):
            steps = np.array(Uniform().schedule(problem, budget).recompute_steps[1:], dtype=int) - 1
        else:
            steps = random.permutation(len(mask))[: budget - 1]
        mask[steps] = True
    return masks


def _ask(objective: Objective, schedules: Sequence[Schedule], losses: dict[Schedule, float]) -> None:
    """Add the mean training losses of those schedules that are new."""
    new = [schedule for schedule in dict.fromkeys(schedules) if schedule not in losses]
    if new:
        means = objective.losses(new, objective.training).mean(axis=1)
        losses.update(zip(new, means.tolist(), strict=True))


def _pymoo() -> SimpleNamespace:
    """What is used of pymoo.

    Raises:
        RuntimeUnavailableError: it is not installed.
    """
    try:
        from pymoo.algorithms.moo.nsga2 import NSGA2
        from pymoo.config import Config
        from pymoo.core.evaluator import Evaluator
        from pymoo.core.problem import Problem
        from pymoo.core.termination import NoTermination
        from pymoo.operators.crossover.pntx import TwoPointCrossover
        from pymoo.operators.mutation.bitflip import BitflipMutation
        from pymoo.problems.static import StaticProblem
    except ImportError:
        raise RuntimeUnavailableError("policy nsga2: needs pymoo; pip install 'recache-compile[train]'") from None
    Config.warnings["not_compiled"] = False  # it would print to stdout, where --json has one object only
    return SimpleNamespace(
        NSGA2=NSGA2,
        Evaluator=Evaluator,
        Problem=Problem,
        NoTermination=NoTermination,
        TwoPointCrossover=TwoPointCrossover,
        BitflipMutation=BitflipMutation,
        StaticProblem=StaticProblem,
    )
