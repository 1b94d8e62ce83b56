from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recache_compile.errors import ScheduleError
from recache_compile.ir.schedule import Schedule
from recache_compile.policies.annealing import Annealing
from recache_compile.policies.base import Problem
from recache_compile.policies.uniform import Uniform


@dataclass
class FakeObjective:
    """A loss that is a function of the steps, with noise by sample that cancels over the training samples."""

    loss: Callable[[np.ndarray], float]
    training: tuple[int, ...] = (0, 1)
    held_out: tuple[int, ...] = (2,)
    batch_size: int = 3
    asked: list[Schedule] = field(default_factory=list)

    def losses(self, schedules: Sequence[Schedule], batches: Sequence[int]) -> np.ndarray:
        assert tuple(batches) == self.training
        self.asked.extend(schedules)
        noise = np.repeat([1.0, -1.0], self.batch_size)
        return np.array([self.loss(np.array(each.recompute_steps)) + noise for each in schedules])


def distance_to(*target: int) -> Callable[[np.ndarray], float]:
    """How far the steps are from those wanted, in all."""
    return lambda steps: float(np.abs(steps - np.array(target)).sum())


def rugged(steps: np.ndarray) -> float:
    """A loss with many local minima."""
    return float(np.sin(steps * 7.3).sum() * np.cos(steps[1:] * steps[:-1]).sum())


def test_the_optimum_of_a_plain_loss_is_found() -> None:
    objective = FakeObjective(distance_to(0, 1, 2, 9, 11))
    found = Annealing(evaluations=1000).schedule(Problem(12, objective=objective), 5)
    assert found.recompute_steps == (0, 1, 2, 9, 11)


@pytest.mark.parametrize("evaluations", [1, 2, 7, 50])
def test_never_more_schedules_than_paid_for_and_the_best_of_them(evaluations: int) -> None:
    objective = FakeObjective(rugged)
    found = Annealing(evaluations=evaluations).schedule(Problem(30, objective=objective), 6)
    assert objective.asked[0] == Uniform().schedule(Problem(30), 6)
    assert len(objective.asked) == len(set(objective.asked)) <= evaluations
    assert rugged(np.array(found.recompute_steps)) == min(
        rugged(np.array(each.recompute_steps)) for each in objective.asked
    )


def test_all_is_spent_where_moves_still_help() -> None:
    objective = FakeObjective(distance_to(0, 45, 46, 47, 48, 49))
    Annealing(evaluations=60).schedule(Problem(50, objective=objective), 6)
    assert len(objective.asked) == 60


def test_no_single_move_helps_at_the_end() -> None:
    objective = FakeObjective(rugged)
    found = Annealing(evaluations=10_000).schedule(Problem(10, objective=objective), 4).recompute_steps
    for rest in combinations(range(1, 10), 3):
        if len({0, *rest} & set(found)) == 3:
            assert rugged(np.array((0, *rest))) >= rugged(np.array(found))


@pytest.mark.parametrize("seed", range(3))
def test_annealing_leaves_a_local_minimum_that_climbing_does_not(seed: int) -> None:
    start, best = Uniform().schedule(Problem(8), 3).recompute_steps, (0, 6, 7)
    objective = FakeObjective(lambda steps: {start: 1.0, best: 0.0}.get(tuple(steps.tolist()), 1.05))
    problem = Problem(8, objective=objective, seed=seed)
    assert Annealing(evaluations=200, share=0.0).schedule(problem, 3).recompute_steps == start
    assert Annealing(evaluations=1000, temperature=1.0).schedule(problem, 3).recompute_steps == best


def test_the_seed_decides() -> None:
    found = [
        Annealing(evaluations=20).schedule(Problem(30, objective=FakeObjective(rugged), seed=seed), 6)
        for seed in (0, 0, 1)
    ]
    assert found[0] == found[1] != found[2]


@given(st.integers(1, 12).flatmap(lambda total: st.tuples(st.just(total), st.integers(1, total))), st.integers(1, 30))
def test_exactly_k_steps(case: tuple[int, int], evaluations: int) -> None:
    total, budget = case
    objective = FakeObjective(lambda steps: float(np.sin(steps).sum()))
    assert Annealing(evaluations).schedule(Problem(total, objective=objective), budget).budget == budget
    assert len(objective.asked) <= evaluations


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (Annealing(evaluations=0), "evaluations 0: expected at least 1"),
        (Annealing(share=1.5), "share 1.5"),
        (Annealing(temperature=-1.0), "temperature -1.0"),
        (Annealing(cooling=0.0), "cooling 0.0"),
    ],
)
def test_unusable_options_are_refused(policy: Annealing, message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        policy.schedule(Problem(30, objective=FakeObjective(rugged)), 6)


def test_a_missing_objective_is_named() -> None:
    with pytest.raises(ScheduleError, match="policy annealing: searches on the true loss"):
        Annealing().schedule(Problem(30), 6)
