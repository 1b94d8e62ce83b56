"""What the records of a generation tell, as values over the steps."""

from typing import Any

import pytest
import torch
from torch import Tensor

from recache_compile.pipelines.rollout import values_of_steps
from recache_compile.runtimes.dispatcher_observer import StepRecord

STEPS = 3
Records = dict[tuple[str, int], StepRecord]


def records(wrap: Any = lambda value: (value,), branches: tuple[str, ...] = ("b", "a")) -> Records:
    """The steps of branches in turn, the last step first."""
    return {
        (branch, step): StepRecord(
            step, branch, None, step == 0, (), wrap(torch.rand(2)), 0, {0: torch.rand(3), 1: torch.rand(4)}
        )
        for step in reversed(range(STEPS))
        for branch in branches
    }


def equal(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return len(ours) == len(theirs) and all(map(torch.equal, ours, theirs))


def test_values_are_in_the_order_of_the_steps() -> None:
    made = records()
    predictions, features = values_of_steps(made)
    expected = [[made[branch, step].result[0] for step in range(STEPS)] for branch in "ab"]
    assert all(map(equal, predictions, expected))
    assert len(predictions) == 2
    places = [(branch, site) for branch in "ab" for site in (0, 1)]
    kept = [[made[branch, step].features[site] for step in range(STEPS)] for branch, site in places]
    assert all(map(equal, features, kept))
    assert len(features) == 4


@pytest.mark.parametrize("wrap", [lambda value: {"sample": value}, lambda value: [value, None], lambda value: value])
def test_results_may_have_any_form(wrap: Any) -> None:
    plain = records(branches=("",))
    wrapped = {
        place: StepRecord(each.step, "", None, each.first, (), wrap(each.result[0]), 0, each.features)
        for place, each in plain.items()
    }
    assert all(map(equal, values_of_steps(wrapped)[0], values_of_steps(plain)[0]))


def test_each_tensor_of_a_result_is_a_prediction() -> None:
    made = records(lambda value: (value, 2 * value))
    predictions, _ = values_of_steps(made)
    assert [len(steps) for steps in predictions] == [STEPS] * 4
    assert equal(predictions[1], [2 * value for value in predictions[0]])


def test_steps_that_were_not_run_are_left_out() -> None:
    made = records()
    del made["a", 0]
    predictions, features = values_of_steps(made)
    assert [len(steps) for steps in predictions] == [STEPS - 1, STEPS]
    assert [len(steps) for steps in features] == [STEPS - 1] * 2 + [STEPS] * 2
