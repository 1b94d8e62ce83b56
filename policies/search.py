"""Search on the true loss: a shortlist by the surrogate, a race, hill climbing; then a policy is fitted."""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from math import comb

import numpy as np

from recache_compile.ir.schedule import Schedule
from recache_compile.policies.base import Policy, Problem, Progress, check_options
from recache_compile.policies.dynamic import DynamicProgram, Minimax
from recache_compile.policies.front_loaded import FrontLoaded
from recache_compile.policies.gram import Gram
from recache_compile.policies.moves import climb, descend, random_schedule, relocations
from recache_compile.policies.race import race
from recache_compile.policies.recache import ReCache, most_likely
from recache_compile.policies.reinforce import Reinforce, fit, new_logits
from recache_compile.policies.surrogate import Surrogate
from recache_compile.policies.thresholds import MagCache, TeaCache
from recache_compile.policies.uniform import Uniform


@dataclass(frozen=True, slots=True)
class Climb:
    """Hill climbing on the true loss by moving one recompute step at a time.

    Moves are tried in the surrogate's order where there is a calibration, else nearest
    first, a handful at a time, in a race against the schedule that they change.

    Args:
        evaluations: schedules tried at most.
        handful: moves tried together.
        patience: moves from one schedule that may fail before it counts as a minimum.
    """

    evaluations: int = 40
    handful: int = 8
    patience: int = 32

    def __post_init__(self) -> None:
        check_options("climb", {"evaluations": 1, "handful": 1, "patience": 1}, self)

    def schedule(self, problem: Problem, budget: int) -> Schedule:
        """From the uniform schedule."""
        start = Uniform().schedule(problem, budget)
        return best_of(self.climb(problem, start))

    def climb(self, problem: Problem, start: Schedule) -> dict[Schedule, float]:
        """All schedules that ran on every training batch, with their mean losses."""
        objective = problem.need_objective("climb")
        rank = _ranking(problem)
        known = {start: float(objective.losses([start], objective.training).mean())}
        tried = {start}

        def better(best: Schedule) -> Schedule | None:
            """The best of the first handful of moves that holds a better one."""
            moves = iter([move for move in rank(best) if move not in tried][: self.patience])
            while handful := list(islice(moves, min(self.handful, self.evaluations - len(tried)))):
                tried.update(handful)
                known.update(race([best, *handful], objective, keep=1))
                winner = best_of(known)
                problem.report(Progress("climb", best.budget, winner, known[winner]))
                if known[winner] < known[best]:
                    return winner
            return None

        climb(start, better)
        return known


@dataclass(frozen=True, slots=True)
class Search:
    """Shortlist, race, climb; and for a policy of several budgets: fit and a short REINFORCE.

    Args:
        shortlist: schedules that enter the race.
        finalists: how many the race leaves at least; the best two of them are climbed from.
        evaluations: schedules that each climb tries at most.
        iterations: of REINFORCE, after the fit.
    """

    shortlist: int = 32
    finalists: int = 4
    evaluations: int = 40
    iterations: int = 24

    def __post_init__(self) -> None:
        check_options("search", {"shortlist": 1, "finalists": 1, "evaluations": 1, "iterations": 0}, self)

    def scaled(self, effort: float) -> "Search":
        """The same with `effort` times as much to try."""
        return replace(
            self,
            shortlist=max(12, round(self.shortlist * effort)),  # room for what the rules say
            evaluations=max(8, round(self.evaluations * effort)),
            iterations=round(self.iterations * effort),
        )

    def reports(self, budgets: int) -> int:
        """How many times at most progress is reported for so many budgets."""
        handfuls = self.evaluations // Climb().handful + 1
        return budgets * (4 + 2 * handfuls) + self.iterations

    def schedule(self, problem: Problem, budget: int) -> Schedule:
        """The schedule with the lowest training loss that was found."""
        return best_of(polish(problem, self.explore(problem, budget)))

    def explore(self, problem: Problem, budget: int, known: Iterable[Schedule] = ()) -> dict[Schedule, float]:
        """Race and climb for one budget.

        Args:
            problem: with an objective; a calibration makes the shortlist better.
            budget: number of recompute steps k.
            known: good schedules of other budgets, from which starts are made.

        Returns:
            All schedules that ran on every training batch, with their mean losses.
        """
        objective = problem.need_objective("search")
        results = race(self.candidates(problem, budget, known), objective, self.finalists)
        problem.report(Progress("race", budget, *results[0]))
        evaluated = dict(results)

        def report_best(each: Progress) -> None:
            best = best_of({**evaluated, each.schedule: each.loss})
            problem.report(replace(each, schedule=best, loss=min(each.loss, evaluated.get(best, each.loss))))

        for start, _ in results[:2]:
            evaluated |= Climb(self.evaluations).climb(replace(problem, report=report_best), start)
        return evaluated

    def candidates(self, problem: Problem, budget: int, known: Iterable[Schedule] = ()) -> list[Schedule]:
        """The shortlist: the surrogate's best or random schedules, those of other budgets changed, and those of rules.

        Rules are the uniform and front-loaded ones and, with a calibration, those of DPCache,
        LeMiCa, MagCache and TeaCache.
        """
        front: list[Policy] = [FrontLoaded(power) for power in (0.6, 0.8, 1.25, 1.5)]
        near = [each for schedule in known for each in _with_budget(schedule, budget)]
        if problem.calibration is None:
            random = np.random.default_rng((problem.seed, budget))
            near = near[:: -(-len(near) // (self.shortlist // 4 or 1)) or 1]
            near += [rule.schedule(problem, budget) for rule in front]
            rest = [random_schedule(problem.num_steps, budget, random) for _ in range(self.shortlist)]
        else:
            forecaster = problem.need_forecaster("search")
            rules: list[Policy] = [MagCache(), TeaCache()]
            if comb(problem.num_steps, forecaster.order + 2) <= 10**6:  # histories; more of them take long
                rules += [DynamicProgram(), Minimax()]
            minima = [schedule for schedule, _ in Gram().minima(problem, budget)]
            around = [move for schedule in minima[:2] for move in relocations(schedule)]
            rank = Surrogate(problem.calibration, forecaster).errors
            near = minima[:2] + sorted_by(rank, dict.fromkeys(near))[: self.shortlist // 4]
            near += [rule.schedule(problem, budget) for rule in (*rules, *front)]
            rest = minima[2:] + sorted_by(rank, dict.fromkeys(around))
        return list(dict.fromkeys([Uniform().schedule(problem, budget), *near, *rest]))[: self.shortlist]

    def train(self, problem: Problem, budgets: Sequence[int]) -> ReCache:
        """One policy for all budgets: search each, fit, and try to improve it by REINFORCE.

        The result of REINFORCE is taken only if it beats the fitted policy on the held-out
        samples by more than two standard errors.
        """
        evaluated: dict[int, dict[Schedule, float]] = {}
        for budget in sorted(budgets, reverse=True):
            bests = [best_of(losses) for losses in evaluated.values()]
            evaluated[budget] = self.explore(problem, budget, bests[-1:])
        evaluated = {budget: polish(problem, losses) for budget, losses in evaluated.items()}
        fitted = fit(new_logits(problem, 64), evaluated, between(problem, evaluated))
        start = ReCache(fitted)
        _report_fit(problem, start, budgets, evaluated)
        if not self.iterations:
            return start
        twin = copy.deepcopy(fitted)
        trained = Reinforce(iterations=self.iterations, rate=0.002, every=12).train(problem, budgets, twin)
        if is_better(problem, trained, start, budgets):
            return trained
        _report_fit(problem, start, budgets, evaluated)  # what the attempts have shown is not what is taken
        return start


def polish(problem: Problem, evaluated: dict[Schedule, float]) -> dict[Schedule, float]:
    """Race the best schedule against all that have one step moved by one; four of them run on every batch.

    Climbing tries moves in the surrogate's order and a handful at a time, and may never come to these.

    Returns:
        What was given, and what has run on every training batch since.
    """
    best = best_of(evaluated)
    near = [move for move in relocations(best) if _distance(best, move) == 1]
    evaluated = evaluated | dict(race([best, *near], problem.need_objective("search")))
    winner = best_of(evaluated)
    problem.report(Progress("climb", winner.budget, winner, evaluated[winner]))
    return evaluated


def between(problem: Problem, evaluated: Mapping[int, Mapping[Schedule, float]]) -> list[Schedule]:
    """A schedule for every other budget, 2..T-1, a step fewer or more at a time: below the largest one
    that was searched from the next larger budget and improved on the surrogate, above it the surrogate's
    favourite step added.

    Without a calibration there are none.
    """
    if problem.calibration is None:
        return []
    score = Surrogate(problem.calibration, problem.need_forecaster("search")).errors
    found = {budget: best_of(losses) for budget, losses in evaluated.items()}
    largest = max(found)
    for budget in (*range(largest + 1, problem.num_steps), *range(largest - 1, 1, -1)):
        if budget not in found:
            neighbour = found[budget - 1 if budget > largest else budget + 1]
            nearest = sorted_by(score, _with_budget(neighbour, budget))[0]
            found[budget] = descend(nearest, score)[0] if budget < largest else nearest
    return [schedule for budget, schedule in found.items() if budget not in evaluated]


def is_better(problem: Problem, one: ReCache, other: ReCache, budgets: Sequence[int]) -> bool:
    """Whether a policy beats another on held-out samples by more than two standard errors, budgets counting alike."""
    objective = problem.need_objective("search")
    ratios = []
    for budget in budgets:
        pair = [policy.schedule(problem, budget) for policy in (one, other)]
        losses = objective.losses(pair, objective.held_out)
        ratios.append((losses[0] - losses[1]) / (abs(losses[1].mean()) or 1.0))
    difference = np.mean(ratios, 0)
    error = difference.std(ddof=1) / np.sqrt(len(difference)) if len(difference) > 1 else np.inf
    return bool(difference.mean() < -2 * error)


def best_of(evaluated: Mapping[Schedule, float]) -> Schedule:
    """The schedule with the lowest loss."""
    return min(evaluated, key=lambda schedule: (evaluated[schedule], schedule.recompute_steps))


def sorted_by(score: Callable[[Sequence[Schedule]], np.ndarray], schedules: Iterable[Schedule]) -> list[Schedule]:
    """Schedules by their score, lowest first."""
    each = list(schedules)
    return [each[at] for at in np.argsort(score(each), kind="stable")] if each else []


def _report_fit(
    problem: Problem, fitted: ReCache, budgets: Sequence[int], evaluated: Mapping[int, Mapping[Schedule, float]]
) -> None:
    """Report the schedules of a fitted policy and their training losses."""
    for budget in budgets:
        mode = most_likely(fitted.logits, budget)
        problem.report(Progress("fit", budget, mode, evaluated[budget].get(mode, float("nan"))))


def _ranking(problem: Problem) -> Callable[[Schedule], list[Schedule]]:
    """The order in which the moves of a schedule are tried."""
    if problem.calibration is not None and problem.forecaster is not None:
        surrogate = Surrogate(problem.calibration, problem.forecaster)
        return lambda schedule: sorted_by(surrogate.errors, relocations(schedule))
    return lambda schedule: sorted(relocations(schedule), key=lambda move: _distance(schedule, move))


def _distance(schedule: Schedule, move: Schedule) -> int:
    """How far the one step was moved."""
    (gone,) = set(schedule.recompute_steps) - set(move.recompute_steps)
    (new,) = set(move.recompute_steps) - set(schedule.recompute_steps)
    return abs(gone - new)


def _with_budget(schedule: Schedule, budget: int) -> list[Schedule]:
    """Schedules of another budget that differ as little as possible: one step more or fewer at a time."""
    steps, total = schedule.recompute_steps, schedule.num_steps
    level = [steps]
    while len(level[0]) > budget:
        level = _thinned({tuple(s for s in each if s != drop) for each in level for drop in each[1:]})
    while len(level[0]) < budget:
        level = _thinned({tuple(sorted((*each, new))) for each in level for new in range(total) if new not in each})
    return [Schedule(each, total) for each in level]


def _thinned(sets: set[tuple[int, ...]], most: int = 256) -> list[tuple[int, ...]]:
    """At most so many of them, evenly chosen."""
    each = sorted(sets)
    return each[:: -(-len(each) // most)]
