"""Schedules are exact or refused."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recache_compile.errors import ScheduleError
from recache_compile.ir.schedule import Schedule, check_budgets


@given(st.integers(1, 60).flatmap(lambda total: st.tuples(st.just(total), st.sets(st.integers(0, total - 1)))))
def test_mask_round_trip(case: tuple[int, set[int]]) -> None:
    total, steps = case
    schedule = Schedule(tuple(steps | {0}), total)
    assert Schedule.from_mask(schedule.mask) == schedule
    assert schedule.budget == schedule.mask.count("1") == len(steps | {0})


SCHEDULES = st.integers(1, 40).flatmap(
    lambda total: st.sets(st.integers(0, total - 1)).map(lambda steps: Schedule(tuple(steps | {0}), total))
)


@given(SCHEDULES, st.data())
def test_a_start_in_the_middle_is_recomputed_and_what_comes_later_stays(
    schedule: Schedule, data: st.DataObject
) -> None:
    start = data.draw(st.integers(0, schedule.num_steps - 1))
    rest = schedule.starting_at(start)
    assert rest.num_steps == schedule.num_steps - start
    assert rest.mask == "1" + schedule.mask[start + 1 :]
    assert rest.budget <= schedule.budget
    again = data.draw(st.integers(0, rest.num_steps - 1))
    assert rest.starting_at(again) == schedule.starting_at(start + again)


def test_known_starts() -> None:
    schedule = Schedule((0, 4, 8), 12)
    assert schedule.starting_at(0) == schedule
    assert schedule.starting_at(3) == Schedule((0, 1, 5), 9)
    assert schedule.starting_at(4) == Schedule((0, 4), 8)
    assert schedule.starting_at(11) == Schedule((0,), 1)


@pytest.mark.parametrize("start", [12, 13])
def test_a_start_after_the_end_is_refused(start: int) -> None:
    with pytest.raises(ScheduleError):
        Schedule((0, 4, 8), 12).starting_at(start)


def test_steps_are_sorted() -> None:
    assert Schedule((5, 0, 3), 8).recompute_steps == (0, 3, 5)


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ((1, 2), "step 0 is missing"),
        ((0, 8), "outside 0..7"),
        ((0, -1), "outside 0..7"),
        ((0, 3, 3), "repeated"),
        ((0, 1.5), "whole numbers"),
        ((0, True), "whole numbers"),
        ((), "step 0 is missing"),
    ],
)
def test_unusable_steps_are_refused(steps: tuple[int, ...], message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        Schedule(steps, 8)


def test_mask_of_other_digits_is_refused() -> None:
    with pytest.raises(ScheduleError, match="only 0 and 1"):
        Schedule.from_mask("1020")


@pytest.mark.parametrize(
    ("budgets", "message"),
    [((0,), "expected 1..10"), ((11,), "expected 1..10"), ((5, 5), "repeated"), ((), "none given"), ((2.5,), "whole")],
)
def test_unusable_budgets_are_refused(budgets: tuple[int, ...], message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        check_budgets(budgets, 10)


@pytest.mark.parametrize("budgets", [5, "5,10", None])
def test_budgets_are_several_numbers(budgets: Any) -> None:
    with pytest.raises(ScheduleError, match=r"budgets .*: expected several whole numbers, as in \(5, 10, 15\)"):
        check_budgets(budgets, 8)
