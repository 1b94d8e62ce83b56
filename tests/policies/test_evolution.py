import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import combinations, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recache_compile.errors import RuntimeUnavailableError, ScheduleError
from recache_compile.ir.schedule import Schedule
from recache_compile.policies.base import Problem
from recache_compile.policies.evolution import NearestBudget, Nsga2
from recache_compile.policies.uniform import Uniform

pytest.importorskip("pymoo")


@dataclass
class FakeObjective:
    """A loss that is a function of the steps."""

    loss: Callable[[tuple[int, ...]], float]
    training: tuple[int, ...] = (0, 1)
    held_out: tuple[int, ...] = (2,)
    batch_size: int = 2
    asked: list[Schedule] = field(default_factory=list)

    def losses(self, schedules: Sequence[Schedule], batches: Sequence[int]) -> np.ndarray:
        assert tuple(batches) == self.training
        self.asked.extend(schedules)
        return np.array([[self.loss(each.recompute_steps)] * 4 for each in schedules])


def gaps(steps: tuple[int, ...]) -> float:
    """Squared gaps, the later the dearer; strictly better with more steps."""
    ends = (*steps[1:], 12)
    return float(sum((end - start) ** 2 * (1 + start) for start, end in zip(steps, ends, strict=True)))


def best_of(budget: int) -> float:
    return min(gaps((0, *rest)) for rest in combinations(range(1, 12), budget - 1))


def test_the_optimum_of_each_budget_is_found() -> None:
    for budget in (3, 6, 9):
        found = Nsga2().schedule(Problem(12, objective=FakeObjective(gaps)), budget)
        assert gaps(found.recompute_steps) == best_of(budget)


def test_the_front_falls_and_is_the_true_one() -> None:
    front = Nsga2(population=40, generations=30).front(Problem(12, objective=FakeObjective(gaps)), range(2, 8))
    assert [schedule.budget for schedule, _ in front] == [2, 3, 4, 5, 6, 7]
    assert [loss for _, loss in front] == [best_of(budget) for budget in range(2, 8)]
    assert all(before[1] > after[1] for before, after in pairwise(front))


def test_a_dominated_budget_still_has_its_best_schedule() -> None:
    objective = FakeObjective(lambda steps: float(len(steps)) + sum(steps) / 1000)
    problem = Problem(10, objective=objective)
    assert [schedule.budget for schedule, _ in Nsga2().front(problem, range(3, 7))] == [3]
    objective.asked.clear()
    found = Nsga2().schedule(problem, 5)
    asked = [sum(each.recompute_steps) for each in objective.asked if each.budget == 5]
    assert found.budget == 5
    assert sum(found.recompute_steps) == min(asked) < max(asked)


def test_each_schedule_is_asked_once_within_the_bound_and_near_the_budget() -> None:
    objective = FakeObjective(gaps)
    Nsga2(population=10, generations=5).schedule(Problem(12, objective=objective), 6)
    assert len(objective.asked) == len(set(objective.asked)) <= 50
    assert {schedule.budget for schedule in objective.asked} <= {4, 5, 6, 7, 8}
    assert Uniform().schedule(Problem(12), 6) in objective.asked


def test_the_seed_decides() -> None:
    asked = []
    for seed in (0, 0, 1):
        objective = FakeObjective(gaps)
        Nsga2(generations=4).schedule(Problem(40, objective=objective, seed=seed), 6)
        asked.append(objective.asked)
    assert asked[0] == asked[1] != asked[2]


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 12).flatmap(lambda total: st.tuples(st.just(total), st.integers(1, total))))
def test_exactly_k_steps(case: tuple[int, int]) -> None:
    total, budget = case
    problem = Problem(total, objective=FakeObjective(lambda steps: float(np.sin(steps).sum())))
    assert Nsga2(population=4, generations=3).schedule(problem, budget).budget == budget


@given(st.lists(st.booleans(), min_size=1, max_size=20), st.data())
def test_repair_changes_no_more_than_it_must(bits: list[bool], data: st.DataObject) -> None:
    mask = np.array(bits)
    budgets = tuple(sorted(data.draw(st.sets(st.integers(1, len(bits) + 1), min_size=1))))
    repaired = NearestBudget(budgets, np.random.default_rng(0)).repaired(mask)
    present = 1 + sum(bits)
    assert 1 + repaired.sum() in budgets
    assert (repaired != mask).sum() == min(abs(budget - present) for budget in budgets)


def test_nothing_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    Nsga2(population=4, generations=2).schedule(Problem(12, objective=FakeObjective(gaps)), 6)
    assert capfd.readouterr() == ("", "")


def test_a_missing_pymoo_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pymoo.algorithms.moo.nsga2", None)
    with pytest.raises(RuntimeUnavailableError, match=r"recache-compile\[train\]"):
        Nsga2().schedule(Problem(12, objective=FakeObjective(gaps)), 6)


@pytest.mark.parametrize("policy", [Nsga2(population=1), Nsga2(generations=0)])
def test_unusable_options_are_refused(policy: Nsga2) -> None:
    with pytest.raises(ScheduleError, match="expected at least 2 and 1"):
        policy.schedule(Problem(12, objective=FakeObjective(gaps)), 6)


def test_a_missing_objective_is_named() -> None:
    with pytest.raises(ScheduleError, match="policy nsga2: searches on the true loss"):
        Nsga2().schedule(Problem(12), 6)
