from collections.abc import Callable, Iterator
from fractions import Fraction
from itertools import combinations, permutations
from math import comb, exp, fsum, log

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from recache_compile.policies.plackett_luce import entropy, ordered_log_probability, sample, set_log_probability

LogProbability = Callable[[Tensor, Tensor], Tensor]
BOTH = pytest.mark.parametrize("log_probability", [ordered_log_probability, set_log_probability])
LOGITS = st.lists(st.floats(-4, 4), min_size=1, max_size=6)


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    """These tests differentiate."""
    with torch.enable_grad():
        yield


def drawn_in_order(logits: list[float], items: tuple[int, ...]) -> float:
    """Urn by urn: the share of each item among those still there."""
    left, probability = set(range(len(logits))), 1.0
    for item in items:
        probability /= fsum(exp(logits[other] - logits[item]) for other in left)
        left.remove(item)
    return probability


def drawn_in_any_order(logits: list[float], items: tuple[int, ...]) -> float:
    return fsum(drawn_in_order(logits, order) for order in permutations(items))


def by_inclusion_and_exclusion(weights: list[int], items: list[int]) -> Fraction:
    """Exact: the items outside come after all of `items`, by the smallest of exponential times."""
    outside = sum(weights) - sum(weights[item] for item in items)
    total = Fraction(0)
    for size in range(len(items) + 1):
        for some in combinations(items, size):
            total += Fraction((-1) ** size * outside, outside + sum(weights[item] for item in some))
    return total


@given(LOGITS, st.data())
@settings(max_examples=60, deadline=None)
def test_both_agree_with_draws_one_by_one(logits: list[float], data: st.DataObject) -> None:
    items = tuple(data.draw(st.permutations(range(len(logits))))[: data.draw(st.integers(0, len(logits)))])
    theta, batch = torch.tensor(logits, dtype=torch.float64), torch.tensor([items], dtype=torch.long)
    assert ordered_log_probability(theta, batch).item() == pytest.approx(log(drawn_in_order(logits, items)), abs=1e-10)
    assert set_log_probability(theta, batch).item() == pytest.approx(log(drawn_in_any_order(logits, items)), abs=1e-10)


@pytest.mark.parametrize("size", range(8))
def test_probabilities_of_all_choices_sum_to_one(size: int) -> None:
    theta = torch.tensor(np.random.default_rng(size).normal(size=7))
    sets = torch.tensor(list(combinations(range(7), size)), dtype=torch.long)
    assert set_log_probability(theta, sets).exp().sum().item() == pytest.approx(1, abs=1e-11)
    orders = torch.tensor(list(permutations(range(7), min(size, 4))), dtype=torch.long)
    assert ordered_log_probability(theta, orders).exp().sum().item() == pytest.approx(1, abs=1e-11)


@pytest.mark.parametrize(
    ("items", "size"), [(49, 6), (49, 24), (49, 48), (99, 50), (199, 1), (199, 100), (199, 198), (999, 99)]
)
def test_equal_logits_make_all_sets_equally_likely(items: int, size: int) -> None:
    one = torch.arange(size)[None]
    assert set_log_probability(torch.full((items,), 3.7), one).item() == pytest.approx(
        -log(comb(items, size)), abs=1e-9
    )


@pytest.mark.parametrize("spread", [3, 1000, 10**9])
def test_a_dozen_of_many_agrees_with_exact_fractions(spread: int) -> None:
    random = np.random.default_rng(spread)
    weights = [int(weight) for weight in np.exp(random.uniform(0, np.log(spread), 49)).round()]
    for items in (random.permutation(49)[:12].tolist(), np.argsort(weights)[:12].tolist()):
        found = set_log_probability(torch.tensor(weights).double().log(), torch.tensor([items])).item()
        exact = by_inclusion_and_exclusion(weights, items)
        assert found == pytest.approx(log(exact.numerator) - log(exact.denominator), abs=1e-9)


def test_few_nodes_are_enough_to_train_with() -> None:
    theta = torch.tensor(np.random.default_rng(0).normal(size=49) * 3)
    for size in (4, 9, 14, 24):
        sets = torch.tensor(np.random.default_rng(size).permuted(np.tile(np.arange(49), (5, 1)), axis=1)[:, :size])
        assert torch.allclose(set_log_probability(theta, sets, nodes=64), set_log_probability(theta, sets), atol=1e-6)


def test_the_set_does_not_depend_on_the_order_in_which_it_is_named() -> None:
    theta = torch.tensor([0.3, -1.0, 2.0, 0.5])
    values = set_log_probability(theta, torch.tensor(list(permutations((0, 1, 3)))))
    assert torch.allclose(values, values[:1].expand(6), atol=1e-13, rtol=0)


@BOTH
def test_a_shift_of_all_logits_changes_nothing(log_probability: LogProbability) -> None:
    theta, items = torch.tensor([0.3, -1.0, 2.0, 0.5], dtype=torch.float64), torch.tensor([[2, 0], [1, 3]])
    assert torch.allclose(log_probability(theta + 400, items), log_probability(theta, items), atol=1e-10)


@BOTH
@pytest.mark.parametrize("size", range(6))
def test_gradients_agree_with_finite_differences(log_probability: LogProbability, size: int) -> None:
    theta = torch.tensor(np.random.default_rng(0).normal(size=5))
    items = torch.tensor([[4, 1, 0, 3, 2], [2, 3, 4, 0, 1]])[:, :size]
    (gradient,) = torch.autograd.grad(log_probability(theta.requires_grad_(), items).sum(), theta)
    step = 1e-5
    differences = [
        (log_probability(theta + move, items) - log_probability(theta - move, items)).sum().item() / (2 * step)
        for move in step * torch.eye(5, dtype=torch.float64)
    ]
    assert gradient.tolist() == pytest.approx(differences, abs=1e-8)


@BOTH
@pytest.mark.parametrize("single", [False, True])
def test_extreme_logits_have_finite_values_and_gradients(log_probability: LogProbability, single: bool) -> None:
    for signs in ([1, -1, 1, -1, 0, 1], [1, 1, 1, 1, 1, -1], [-1, -1, -1, -1, -1, 1]):
        exact = [30.0 * sign for sign in signs]
        theta = torch.tensor(exact, dtype=torch.float32 if single else torch.float64, requires_grad=True)
        items = torch.tensor(list(permutations(range(6), 3)))
        values = log_probability(theta, items)
        assert bool(values.isfinite().all())
        assert bool((values < 1e-10).all())
        assert bool(torch.autograd.grad(values.sum(), theta)[0].isfinite().all())
        reference = drawn_in_order if log_probability is ordered_log_probability else drawn_in_any_order
        expected = [log(reference(exact, tuple(order))) for order in items.tolist()]
        assert values.tolist() == pytest.approx(expected, abs=1e-9)


@BOTH
def test_logits_beyond_the_range_of_exp_have_no_nan(log_probability: LogProbability) -> None:
    theta = torch.tensor([800.0, -800.0, 0.0, 1.0], dtype=torch.float64, requires_grad=True)
    values = log_probability(theta, torch.tensor([[0, 2], [1, 3], [2, 3]]))
    assert bool(values.isfinite().all())
    assert bool(torch.autograd.grad(values.sum(), theta)[0].isfinite().all())


@pytest.mark.parametrize("size", [0, 4])
def test_nothing_and_everything_are_certain(size: int) -> None:
    theta = torch.tensor([0.3, -1.0, 2.0, 0.5], requires_grad=True)
    values = set_log_probability(theta, torch.arange(size).expand(3, -1))
    assert values.tolist() == [0, 0, 0]
    assert torch.autograd.grad(values.sum(), theta)[0].tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("size", [1, 2, 4])
def test_sampled_orders_have_the_exact_frequencies(size: int) -> None:
    theta, count = torch.tensor([1.0, 0.0, -1.0, 0.5]), 40_000
    found = sample(theta, size, count, torch.Generator().manual_seed(size))
    orders = torch.tensor(list(permutations(range(4), size)))
    exact = ordered_log_probability(theta, orders).exp()
    shares = (found[:, None] == orders).all(2).double().mean(0)
    assert shares.sum().item() == pytest.approx(1)
    assert bool(((shares - exact).abs() <= 4.5 * (exact * (1 - exact) / count).sqrt()).all())


def test_samples_follow_from_the_generator_and_repeat_no_item() -> None:
    theta = torch.zeros(20)
    one, same, other = (sample(theta, 7, 50, torch.Generator().manual_seed(seed)) for seed in (3, 3, 4))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert all(len(set(items)) == 7 for items in one.tolist())
    assert sample(theta, 0, 5, torch.Generator()).shape == (5, 0)


def test_a_certain_item_is_always_drawn_first() -> None:
    theta = torch.tensor([0.0, 60.0, 0.0])
    assert sample(theta, 1, 500, torch.Generator().manual_seed(0)).unique().tolist() == [1]


def test_entropy_is_the_logarithm_of_the_choices_left() -> None:
    assert entropy(torch.zeros(49)).item() == pytest.approx(log(49))
    assert entropy(torch.tensor([0.0, 0.0, -80.0])).item() == pytest.approx(log(2))
