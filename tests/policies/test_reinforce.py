from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations, pairwise, permutations, product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from recache_compile.errors import ScheduleError
from recache_compile.ir.schedule import Schedule
from recache_compile.policies.base import Problem, Progress
from recache_compile.policies.moves import random_schedule
from recache_compile.policies.plackett_luce import ordered_log_probability, sample, set_log_probability
from recache_compile.policies.recache import Logits, most_likely
from recache_compile.policies.registry import get_policy
from recache_compile.policies.reinforce import Likelihood, Reinforce, fit, leave_one_out, new_logits
from recache_compile.policies.uniform import Uniform
from tests.policies.fakes import FakeObjective, away_from, mask_of, separable
from tests.policies.fakes import pairwise as neighbours

TOTAL = 10
LOSSES = st.lists(st.floats(-5, 5), min_size=2, max_size=6)


@pytest.fixture
def _gradients() -> Iterator[None]:
    with torch.enable_grad():
        yield


def problem_of(objective: FakeObjective, seed: int = 0, num_steps: int = TOTAL) -> Problem:
    return Problem(num_steps, objective=objective, seed=seed)


def best_for(objective: FakeObjective, budget: int, num_steps: int = TOTAL) -> Schedule:
    every = [Schedule((0, *rest), num_steps) for rest in combinations(range(1, num_steps), budget - 1)]
    return min(every, key=objective.mean)


@pytest.mark.usefixtures("_gradients")
@given(LOSSES, st.floats(0, 2))
@settings(deadline=None)
def test_each_baseline_is_the_mean_of_the_others(values: list[float], weight: float) -> None:
    log_p = torch.linspace(-3, -1, len(values), dtype=torch.float64, requires_grad=True)
    (found,) = torch.autograd.grad(leave_one_out(torch.tensor(values, dtype=torch.float64), log_p, weight), log_p)
    regular = [value + weight * each for value, each in zip(values, log_p.tolist(), strict=True)]
    others = [np.mean([*regular[:number], *regular[number + 1 :]]) for number in range(len(values))]
    expected = [(own - rest) / len(values) for own, rest in zip(regular, others, strict=True)]
    assert found.tolist() == pytest.approx(expected, abs=1e-12)


@pytest.mark.usefixtures("_gradients")
def test_one_schedule_alone_has_no_gradient() -> None:
    log_p = torch.tensor([-1.0], dtype=torch.float64, requires_grad=True)
    (found,) = torch.autograd.grad(leave_one_out(torch.tensor([7.0]).double(), log_p, 0.1), log_p)
    assert found.tolist() == [0.0]


def tiny(weight: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits of four steps, all ordered pairs, the losses of their sets, and the gradient of what is to be lowered."""
    theta = torch.tensor([0.4, -0.3, 1.0, 0.1], dtype=torch.float64, requires_grad=True)
    pairs = torch.tensor(list(permutations(range(4), 2)))
    losses = (pairs.sum(1) ** 2 % 7).double() / 3
    log_set = set_log_probability(theta, pairs)
    each_set = pairs[:, 0] < pairs[:, 1]
    expected = (log_set.exp() * (losses + weight * log_set))[each_set].sum()
    (gradient,) = torch.autograd.grad(expected, theta)
    return theta, pairs, losses, gradient


@pytest.mark.usefixtures("_gradients")
@pytest.mark.parametrize("weight", [0.0, 0.5])
@pytest.mark.parametrize("count", [2, 3])
def test_the_expected_estimate_is_the_gradient_of_the_expected_loss(count: int, weight: float) -> None:
    theta, pairs, losses, gradient = tiny(weight)
    sets = pairs[:, 0] < pairs[:, 1]
    pairs, losses = pairs[sets], losses[sets]
    log_p = set_log_probability(theta, pairs)
    mean = torch.zeros(4, dtype=torch.float64)
    for drawn in product(range(6), repeat=count):
        at = torch.tensor(drawn)
        value = leave_one_out(losses[at], log_p[at], weight)
        (estimate,) = torch.autograd.grad(value, theta, retain_graph=True)
        mean += log_p[at].sum().exp().detach() * estimate
    assert mean.tolist() == pytest.approx(gradient.tolist(), abs=1e-11)


@pytest.mark.usefixtures("_gradients")
def test_estimates_from_samples_are_unbiased_and_sets_have_less_variance() -> None:
    theta, pairs, _, gradient = tiny(0.0)
    repeats, count = 2000, 4
    items = sample(theta, 2, repeats * count, torch.Generator().manual_seed(0))
    losses = (items.sum(1) ** 2 % 7).double().reshape(repeats, count) / 3
    spreads = []
    for log_probability in (set_log_probability, ordered_log_probability):
        log_p = log_probability(theta, items).detach().reshape(repeats, count).requires_grad_()
        total = torch.stack([leave_one_out(*pair, 0.0) for pair in zip(losses, log_p, strict=True)]).sum()
        (factors,) = torch.autograd.grad(total, log_p)
        of_pairs = [torch.autograd.grad(log_probability(theta, pair[None]).sum(), theta)[0] for pair in pairs]
        which = (items[:, None] == pairs).all(2).int().argmax(1)
        estimates = (factors[..., None] * torch.stack(of_pairs)[which].reshape(repeats, count, 4)).sum(1)
        errors = estimates.std(0) / repeats**0.5
        assert bool(((estimates.mean(0) - gradient).abs() < 4.5 * errors).all())
        spreads.append(estimates.var(0).sum().item())
    assert spreads[0] < spreads[1]


@pytest.mark.parametrize("likelihood", ["set", "ordered"])
def test_training_finds_the_optimum_of_every_budget(likelihood: Likelihood) -> None:
    objective = FakeObjective(separable(TOTAL, seed=3), noise=0.05, common=1.0)
    policy = Reinforce(iterations=140, likelihood=likelihood).train(problem_of(objective), (3, 6))
    for budget in (3, 6):
        assert policy.schedule(problem_of(objective), budget) == best_for(objective, budget)


def test_training_lowers_a_loss_of_neighbours() -> None:
    objective = FakeObjective(neighbours(TOTAL, seed=1, strength=1.0), noise=0.02)
    found = Reinforce(iterations=200).schedule(problem_of(objective), 5)
    every = sorted(objective.mean(Schedule((0, *rest), TOTAL)) for rest in combinations(range(1, TOTAL), 4))
    assert objective.mean(found) <= every[len(every) // 20]


def test_without_width_all_budgets_share_their_logits_and_schedules_are_nested() -> None:
    objective = FakeObjective(separable(TOTAL, seed=3))
    policy = Reinforce(iterations=150, width=0).train(problem_of(objective), (4, 6))
    assert torch.equal(policy.logits(4), policy.logits(6))
    steps = [set(policy.schedule(problem_of(objective), budget).recompute_steps) for budget in range(1, TOTAL + 1)]
    assert all(smaller < larger for smaller, larger in pairwise(steps))
    for budget in (4, 6):
        assert policy.schedule(problem_of(objective), budget) == best_for(objective, budget)


def test_schedules_of_an_iteration_share_their_samples() -> None:
    objective = FakeObjective(separable(TOTAL), common=3.0)
    reports: list[Progress] = []
    problem = replace(problem_of(objective), report=reports.append)
    Reinforce(iterations=30, schedules=5, every=1000).train(problem, (3, 6))
    drawn = [call for call in objective.calls if len(call[0]) == 5]
    assert len(drawn) == len(reports) == 30
    assert all(len(batches) == 1 and set(batches) <= set(objective.training) for _, batches in drawn)
    assert {batches for _, batches in drawn} == {(0,), (1,), (2,)}
    for (schedules, _), report in zip(drawn, reports, strict=True):
        assert {each.budget for each in schedules} == {report.budget}
    assert {report.budget for report in reports} == {3, 6}


def test_held_out_samples_are_never_trained_on() -> None:
    objective = FakeObjective(separable(TOTAL))
    Reinforce(iterations=20, schedules=4, every=5).train(problem_of(objective), (3, 6))
    for schedules, batches in objective.calls:
        if set(batches) & set(objective.held_out):
            assert len(schedules) == 1
            assert batches == objective.held_out


def test_the_network_that_was_best_on_held_out_samples_is_returned() -> None:
    start = most_likely(new_logits(Problem(TOTAL), 64), 4)
    wanted = next(each for each in (Schedule((0, 1, 2, 3), TOTAL), Schedule((0, 7, 8, 9), TOTAL)) if each != start)
    objective = FakeObjective(away_from(wanted), held_out_loss=away_from(start))
    trainer = Reinforce(iterations=60, every=5)
    assert trainer.schedule(problem_of(objective), 4) == start
    assert trainer.schedule(problem_of(replace(objective, held_out=())), 4) == wanted
    agreeing = replace(objective, held_out_loss=None)
    assert trainer.schedule(problem_of(agreeing), 4) == wanted


@pytest.mark.parametrize("shift", [-1.5, -100.0])
def test_losses_may_be_negative_or_change_their_sign(shift: float) -> None:
    wanted = Schedule((0, 7, 8, 9), TOTAL)
    near = away_from(wanted)
    objective = FakeObjective(lambda mask: near(mask) + shift)
    assert Reinforce(iterations=100, every=10).schedule(problem_of(objective), 4) == wanted


def test_every_validation_counts_and_none_is_worse_than_the_start() -> None:
    objective = FakeObjective(neighbours(TOTAL, strength=2.0), held_out_loss=neighbours(TOTAL, seed=7, strength=2.0))
    policy = Reinforce(iterations=40, every=1).train(problem_of(objective), (5,))
    assert objective.held_out_loss is not None
    seen = [
        objective.held_out_loss(mask_of(schedules[0]))
        for schedules, batches in objective.calls
        if batches == objective.held_out
    ]
    assert len(seen) == 41
    assert objective.held_out_loss(mask_of(policy.schedule(problem_of(objective), 5))) == min(seen)


def test_the_seed_decides() -> None:
    found = []
    for seed in (0, 0, 1):
        objective = FakeObjective(separable(TOTAL), noise=0.1)
        policy = Reinforce(iterations=25, every=5).train(problem_of(objective, seed), (3, 6))
        found.append((policy.logits.bias.tolist(), objective.calls))
    assert found[0] == found[1]
    assert found[0] != found[2]


def test_training_leaves_the_global_random_state_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    Reinforce(iterations=2).schedule(problem_of(FakeObjective(separable(TOTAL))), 3)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("likelihood", ["set", "ordered"])
@pytest.mark.parametrize("budget", [1, 2, TOTAL])
def test_the_smallest_and_largest_budgets_are_met(budget: int, likelihood: Likelihood) -> None:
    policy = Reinforce(iterations=5, likelihood=likelihood).train(
        problem_of(FakeObjective(separable(TOTAL))), (budget,)
    )
    assert policy.schedule(Problem(TOTAL), budget).budget == budget
    assert all(bool(value.isfinite().all()) for value in policy.logits.state_dict().values())


def test_it_is_chosen_by_name_with_options() -> None:
    policy = get_policy("recache:iterations=7,likelihood=ordered,rate=0.5,width=0", TOTAL)
    assert policy == Reinforce(iterations=7, likelihood="ordered", rate=0.5, width=0)


def test_what_cannot_be_used_is_named() -> None:
    with pytest.raises(ScheduleError, match="policy recache: searches on the true loss"):
        Reinforce().schedule(Problem(TOTAL), 3)
    with pytest.raises(ScheduleError, match="likelihood 'sets': choose set or ordered"):
        Reinforce(likelihood="sets").schedule(problem_of(FakeObjective(separable(TOTAL))), 3)  # type: ignore[arg-type]


def test_effort_scales_the_iterations() -> None:
    assert Reinforce(iterations=400).scaled(0.25).iterations == 100
    assert Reinforce(iterations=400).scaled(0).iterations == 1
    assert Reinforce(iterations=7).reports(3) == 7


def evaluated_by(objective: FakeObjective, budget: int, num_steps: int) -> dict[Schedule, float]:
    random = np.random.default_rng(budget)
    schedules = dict.fromkeys(random_schedule(num_steps, budget, random) for _ in range(20))
    return {each: objective.mean(each) for each in schedules}


def test_the_best_schedule_of_every_budget_becomes_the_most_likely() -> None:
    objective = FakeObjective(neighbours(25, strength=2.0))
    evaluated = {budget: evaluated_by(objective, budget, 25) for budget in (4, 16)}
    logits = fit(new_logits(Problem(25), 64), evaluated)
    for budget, losses in evaluated.items():
        assert most_likely(logits, budget) == min(losses, key=lambda each: losses[each])


def test_neighbouring_budgets_may_differ_in_all_steps() -> None:
    wanted = {5: Schedule((0, 1, 2, 3, 4), 20), 6: Schedule((0, 15, 16, 17, 18, 19), 20)}
    logits = fit(new_logits(Problem(20), 64), {budget: {each: 1.0} for budget, each in wanted.items()}, iterations=300)
    assert {budget: most_likely(logits, budget) for budget in wanted} == wanted


def test_fitting_takes_losses_of_any_sign_and_the_extreme_budgets() -> None:
    objective = FakeObjective(separable(8))
    evaluated = {
        budget: {each: loss - 3 for each, loss in evaluated_by(objective, budget, 8).items()} for budget in (1, 4, 8)
    }
    evaluated[3] = {Schedule((0, 2, 4), 8): 0.0, Schedule((0, 1, 2), 8): 1.0}
    logits = fit(new_logits(Problem(8), 16), evaluated, iterations=200)
    for budget, losses in evaluated.items():
        assert most_likely(logits, budget) == min(losses, key=lambda each: losses[each])


def test_fitting_the_same_gives_the_same() -> None:
    evaluated = {4: evaluated_by(FakeObjective(separable(12)), 4, 12)}
    first, second = (fit(new_logits(Problem(12), 16), evaluated, iterations=60) for _ in range(2))
    assert torch.equal(first(4), second(4))


def test_what_is_already_most_likely_is_left_alone_at_the_end() -> None:
    logits = new_logits(Problem(12), 16)
    mode = most_likely(logits, 4)
    before = logits(4)
    assert torch.equal(fit(logits, {4: {mode: 1.0}}, iterations=1)(4), before)


def test_new_logits_follow_from_the_seed_and_prefer_little() -> None:
    one, same, other = (new_logits(Problem(50, seed=seed), 64) for seed in (3, 3, 4))
    assert torch.equal(one(7), same(7))
    assert not torch.equal(one(7), other(7))
    assert isinstance(one, Logits)
    assert one(7).std() < 0.2
    assert new_logits(Problem(50), 0)(7).tolist() == [0.0] * 49


def test_a_start_is_trained_on() -> None:
    wanted = Uniform().schedule(Problem(TOTAL), 4)
    start = fit(new_logits(Problem(TOTAL), 16), {4: {wanted: 1.0}}, iterations=100)
    objective = FakeObjective(away_from(wanted))
    policy = Reinforce(iterations=5, rate=1e-4).train(problem_of(objective), (4,), start)
    assert policy.logits.width == 16
    assert policy.schedule(Problem(TOTAL), 4) == wanted
