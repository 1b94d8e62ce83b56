from dataclasses import replace
from functools import partial
from itertools import combinations, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recache_compile.errors import ScheduleError
from recache_compile.ir.forecasters import Taylor
from recache_compile.ir.schedule import Schedule
from recache_compile.policies import search
from recache_compile.policies.base import Calibration, Policy, Problem, Progress
from recache_compile.policies.dynamic import DynamicProgram, Minimax
from recache_compile.policies.gram import Gram
from recache_compile.policies.moves import relocations
from recache_compile.policies.recache import ReCache, most_likely
from recache_compile.policies.reinforce import Reinforce, fit, new_logits
from recache_compile.policies.search import Climb, Search, best_of, is_better
from recache_compile.policies.thresholds import MagCache, TeaCache
from recache_compile.policies.uniform import Uniform
from tests.policies.fakes import FakeObjective, away_from, calibration_of, separable, trajectories
from tests.policies.fakes import pairwise as neighbours

TOTAL = 12
WITH_AND_WITHOUT = pytest.mark.parametrize("calibrated", [False, True], ids=["uncalibrated", "calibrated"])


@pytest.fixture(autouse=True)
def _quick_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "fit", partial(fit, iterations=150))


def problem_of(objective: FakeObjective, calibrated: bool = False, total: int = TOTAL, seed: int = 0) -> Problem:
    calibration: Calibration | None = calibration_of(trajectories(total)) if calibrated else None
    return Problem(total, Taylor(1), calibration, objective, seed)


def every(total: int, budget: int) -> list[Schedule]:
    return [Schedule((0, *rest), total) for rest in combinations(range(1, total), budget - 1)]


def rugged(seed: int) -> FakeObjective:
    """Schedules have nothing to do with each other."""
    return FakeObjective(lambda mask: 0.0, noise=1.0, batch_size=1 + seed % 3)


@WITH_AND_WITHOUT
@pytest.mark.parametrize("seed", range(3))
def test_the_optimum_of_a_loss_of_steps_and_neighbours_is_found(seed: int, calibrated: bool) -> None:
    objective = FakeObjective(neighbours(TOTAL, seed, strength=0.3), noise=0.002, common=1.0)
    found = Search().schedule(problem_of(objective, calibrated), 5)
    assert found == min(every(TOTAL, 5), key=objective.mean)


@WITH_AND_WITHOUT
@pytest.mark.parametrize("policy", [Search(), Search(shortlist=8, evaluations=8), Climb(), Climb(evaluations=3)])
def test_never_worse_than_uniform_on_the_training_samples(policy: Search | Climb, calibrated: bool) -> None:
    for seed in range(2):
        objective = rugged(seed)
        problem = problem_of(objective, calibrated, total=20 + seed, seed=seed)
        found = policy.schedule(problem, 6)
        assert objective.mean(found) <= objective.mean(Uniform().schedule(problem, 6))


@WITH_AND_WITHOUT
def test_what_was_explored_ran_on_every_training_batch(calibrated: bool) -> None:
    objective = FakeObjective(neighbours(TOTAL), noise=0.2)
    explored = Search(shortlist=10, evaluations=20).explore(problem_of(objective, calibrated), 4)
    assert explored == pytest.approx({schedule: objective.mean(schedule) for schedule in explored})
    ran = {
        batch: {each for schedules, batches in objective.calls if batch in batches for each in schedules}
        for batch in objective.training
    }
    assert all(set(explored) <= schedules for schedules in ran.values())
    assert not any(set(batches) & set(objective.held_out) for _, batches in objective.calls)


@WITH_AND_WITHOUT
@pytest.mark.parametrize("seed", range(3))
def test_a_climb_alone_ends_where_no_move_helps(seed: int, calibrated: bool) -> None:
    objective = FakeObjective(neighbours(TOTAL, seed, strength=2.0))
    found = Climb(evaluations=10_000, patience=10_000).schedule(problem_of(objective, calibrated), 5)
    assert all(objective.mean(move) >= objective.mean(found) for move in relocations(found))


@WITH_AND_WITHOUT
def test_a_climb_alone_finds_the_optimum_of_a_separable_loss(calibrated: bool) -> None:
    objective = FakeObjective(separable(TOTAL, seed=2), common=2.0)
    found = Climb(evaluations=400).schedule(problem_of(objective, calibrated), 5)
    assert found == min(every(TOTAL, 5), key=objective.mean)


@given(st.integers(1, 60), st.integers(1, 12), st.integers(1, 60), st.integers(2, 14), st.integers(0, 9))
@settings(max_examples=40, deadline=None)
def test_a_climb_tries_no_more_than_it_was_given(
    evaluations: int, handful: int, patience: int, total: int, seed: int
) -> None:
    objective = rugged(seed)
    climb = Climb(evaluations, handful, patience)
    start = Uniform().schedule(Problem(total), 1 + total // 2)
    known = climb.climb(problem_of(objective, total=total), start)
    assert len(objective.asked) <= evaluations
    assert set(known) <= objective.asked
    assert known == pytest.approx({schedule: objective.mean(schedule) for schedule in known})
    assert best_of(known) == min(known, key=objective.mean)


def test_a_climb_gives_up_after_so_many_failures() -> None:
    start = Uniform().schedule(Problem(20), 6)
    objective = FakeObjective(away_from(start))
    Climb(evaluations=1000, handful=4, patience=10).schedule(problem_of(objective, total=20), 6)
    assert len(objective.asked) == 11


def test_moves_that_fail_on_the_first_batch_run_on_no_other() -> None:
    start = Uniform().schedule(Problem(20), 6)
    objective = FakeObjective(away_from(start))
    Climb().schedule(problem_of(objective, total=20), 6)
    for schedules, batches in objective.calls:
        assert batches == (0,) or schedules == (start,)


def test_moves_are_tried_nearest_first_without_a_calibration() -> None:
    start = Uniform().schedule(Problem(20), 6)
    objective = FakeObjective(away_from(start))
    Climb(evaluations=41, patience=40).schedule(problem_of(objective, total=20), 6)
    tried = [each for schedules, batches in objective.calls if batches == (0,) for each in schedules[1:]]
    moved = [abs(sum(each.recompute_steps) - sum(start.recompute_steps)) for each in tried]
    assert len(tried) == 40
    assert moved == sorted(moved)


def test_progress_never_gets_worse_within_a_climb() -> None:
    reports: list[Progress] = []
    objective = FakeObjective(neighbours(TOTAL, strength=2.0), noise=0.1)
    found = Climb().schedule(replace(problem_of(objective), report=reports.append), 5)
    assert {(each.stage, each.budget) for each in reports} == {("climb", 5)}
    assert all(after.loss <= before.loss for before, after in pairwise(reports))
    assert reports[-1].schedule == found


def test_a_short_list_has_what_gram_would_choose() -> None:
    problem = problem_of(FakeObjective(separable(TOTAL)), calibrated=True)
    found = Search(shortlist=8).candidates(problem, 5, [Uniform().schedule(problem, 6)])
    assert Gram().schedule(problem, 5) in found


@pytest.mark.parametrize("rule", [MagCache(), TeaCache(), DynamicProgram(), Minimax()])
def test_the_smallest_search_has_what_the_rules_would_choose(rule: Policy) -> None:
    problem = problem_of(FakeObjective(separable(TOTAL)), calibrated=True)
    known = [Uniform().schedule(problem, budget) for budget in (6, 7, 8)]
    assert rule.schedule(problem, 5) in Search().scaled(0.01).candidates(problem, 5, known)


def test_candidates_of_a_high_order_need_no_table_of_all_histories() -> None:
    problem = Problem(50, Taylor(4), calibration_of(trajectories(50)), FakeObjective(separable(50)))
    assert len(Search().candidates(problem, 7)) == Search().shortlist


@WITH_AND_WITHOUT
@given(st.integers(2, 16), st.data())
@settings(max_examples=25, deadline=None)
def test_candidates_are_distinct_of_the_budget_and_no_more_than_asked(
    calibrated: bool, total: int, data: st.DataObject
) -> None:
    budget, other = data.draw(st.integers(1, total)), data.draw(st.integers(1, total))
    problem = problem_of(FakeObjective(separable(total)), calibrated, total)
    known = Uniform().schedule(problem, other)
    found = Search(shortlist=9).candidates(problem, budget, [known])
    assert found[0] == Uniform().schedule(problem, budget)
    assert len(set(found)) == len(found) <= 9
    assert {(each.budget, each.num_steps) for each in found} == {(budget, total)}


@pytest.mark.parametrize("budget", [3, 4, 6, 7])
def test_good_schedules_of_neighbouring_budgets_are_starts(budget: int) -> None:
    known = Schedule((0, 1, 2, 10, 11), TOTAL)
    found = Search(shortlist=200).candidates(problem_of(FakeObjective(separable(TOTAL))), budget, [known])
    nested = [
        each
        for each in every(TOTAL, budget)
        if set(each.recompute_steps) <= set(known.recompute_steps)
        or set(each.recompute_steps) >= set(known.recompute_steps)
    ]
    assert set(nested) <= set(found)


@WITH_AND_WITHOUT
@pytest.mark.parametrize("budget", [1, 2, TOTAL - 1, TOTAL])
def test_the_smallest_and_largest_budgets_are_met(budget: int, calibrated: bool) -> None:
    objective = FakeObjective(separable(TOTAL))
    for policy in (Search(), Climb()):
        found = policy.schedule(problem_of(objective, calibrated), budget)
        assert found == min(every(TOTAL, budget), key=objective.mean)


@WITH_AND_WITHOUT
def test_a_policy_for_several_budgets_holds_the_best_schedule_of_each(calibrated: bool) -> None:
    objective = FakeObjective(neighbours(TOTAL, strength=0.3), common=1.0)
    problem = problem_of(objective, calibrated)
    policy = Search(iterations=0).train(problem, (4, 6))
    for budget in (4, 6):
        assert policy.schedule(problem, budget) == min(every(TOTAL, budget), key=objective.mean)
    assert not any(set(batches) & set(objective.held_out) for _, batches in objective.calls)


def test_the_seed_decides_what_is_tried() -> None:
    calls = []
    for seed in (0, 0, 1):
        objective = FakeObjective(neighbours(20), noise=0.3)
        Search(shortlist=12, evaluations=16).explore(problem_of(objective, total=20, seed=seed), 6)
        calls.append(objective.calls)
    assert calls[0] == calls[1] != calls[2]


def test_the_same_training_has_the_same_end() -> None:
    objective = FakeObjective(neighbours(TOTAL), noise=0.3)
    first, second = (
        Search(shortlist=8, evaluations=8, iterations=4).train(problem_of(objective), (3,)).logits for _ in range(2)
    )
    assert first(3).tolist() == second(3).tolist()


def test_stages_are_reported_in_their_order() -> None:
    reports: list[Progress] = []
    objective = FakeObjective(neighbours(TOTAL))
    problem = replace(problem_of(objective), report=reports.append)
    Search(shortlist=8, evaluations=16, iterations=3).train(problem, (3, 5))
    stages = [(each.stage, each.budget) for each in reports]
    order = list(dict.fromkeys(stages))[:6]
    assert order == [("race", 5), ("climb", 5), ("race", 3), ("climb", 3), ("fit", 3), ("fit", 5)]
    assert [stage for stage, _ in stages].count("reinforce") == 3
    for each in reports:
        if each.stage in ("climb", "fit"):
            assert each.loss == pytest.approx(objective.mean(each.schedule))


def policy_for(*schedules: Schedule) -> ReCache:
    wanted = {each.budget: {each: 1.0} for each in schedules}
    policy = ReCache(fit(new_logits(Problem(TOTAL), 16), wanted, iterations=150))
    assert all(most_likely(policy.logits, each.budget) == each for each in schedules)
    return policy


WANTED = Schedule((0, 2, 3, 8), TOTAL)
NEAR = Schedule((0, 2, 3, 9), TOTAL)
LARGER = Schedule((0, 1, 2, 3, 8), TOTAL)


def test_one_policy_is_better_only_beyond_two_standard_errors() -> None:
    better, worse = policy_for(WANTED), policy_for(NEAR)
    for noise in (0.0, 0.5, 3.0, 8.0, 30.0):
        objective = FakeObjective(away_from(WANTED), noise=noise, common=100.0, batch_size=8)
        losses = objective.losses([WANTED, NEAR], objective.held_out)
        gain = losses[1] - losses[0]
        clear = gain.mean() > 2 * gain.std(ddof=1) / len(gain) ** 0.5
        assert is_better(problem_of(objective), better, worse, (4,)) == clear
        assert clear == (noise < 2)
        assert not is_better(problem_of(objective), worse, better, (4,))
        assert not is_better(problem_of(objective), better, better, (4,))


def test_budgets_count_alike_however_large_their_losses_are() -> None:
    one, other = policy_for(WANTED, LARGER), policy_for(NEAR, Schedule((0, 1, 2, 3, 9), TOTAL))

    def loss(mask: np.ndarray) -> float:
        """Step 8 makes the small budget a tenth better and the large one a twentieth worse."""
        return 1 - 0.1 * mask[8] if mask.sum() == 4 else 1000 * (1 + 0.05 * mask[8])

    objective = FakeObjective(loss, noise=1e-6)
    assert is_better(problem_of(objective), one, other, (4, 5))
    assert not is_better(problem_of(objective), other, one, (4, 5))
    assert not is_better(problem_of(objective), one, other, (5,))


def test_one_held_out_sample_proves_nothing() -> None:
    objective = FakeObjective(away_from(WANTED), held_out=(1000,), batch_size=1)
    assert not is_better(problem_of(objective), policy_for(WANTED), policy_for(NEAR), (4,))


@pytest.mark.parametrize(("noise", "taken"), [(0.0, True), (30.0, False)])
def test_what_reinforce_made_is_taken_only_if_it_is_clearly_better(
    noise: float, taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    proposed = policy_for(WANTED)
    monkeypatch.setattr(Reinforce, "train", lambda *_: proposed)
    objective = FakeObjective(away_from(NEAR), held_out_loss=away_from(WANTED), noise=noise)
    policy = Search(shortlist=8, evaluations=60).train(problem_of(objective), (4,))
    assert (policy is proposed) == taken


def test_what_reinforce_made_worse_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Reinforce, "train", lambda *_: policy_for(WANTED))
    objective = FakeObjective(away_from(NEAR))
    policy = Search(shortlist=8, evaluations=60).train(problem_of(objective), (4,))
    assert policy.schedule(Problem(TOTAL), 4) == NEAR


def test_effort_scales_what_is_tried() -> None:
    assert Search(32, 4, 96, 40).scaled(0.5) == Search(16, 4, 48, 20)
    assert Search(32, 4, 96, 40).scaled(0.01) == Search(12, 4, 8, 0)


@pytest.mark.parametrize(("policy", "name"), [(Search(), "search"), (Climb(), "climb")])
def test_a_missing_objective_is_named(policy: Search | Climb, name: str) -> None:
    with pytest.raises(ScheduleError, match=f"policy {name}: searches on the true loss"):
        policy.schedule(Problem(TOTAL), 4)
