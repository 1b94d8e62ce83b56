from pathlib import Path

import pytest

from recache_compile.errors import ScheduleError
from recache_compile.policies.base import Problem
from recache_compile.policies.explicit import from_mapping, read_file, read_schedules


@pytest.mark.parametrize(
    "text",
    [
        "0,2,5",
        "10100100",
        "[0, 2, 5]",
        "[1, 0, 1, 0, 0, 1, 0, 0]",
        '"10100100"',
        '{"3": [0, 2, 5], "1": [0]}',
        '{"cache_step": [7, 1, 3, 4, 6]}',
        "[[0], [0, 2, 5]]",
    ],
)
def test_every_form_of_one_schedule(text: str) -> None:
    schedule = read_schedules(text, 8, "here").schedule(Problem(8), 3)
    assert schedule.recompute_steps == (0, 2, 5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[2, 5]", "step 0 is missing"),
        ("[0, 9]", "outside 0..7"),
        ('{"cache_step": [1, 8]}', "cached step 8 is outside 0..7"),
        ('{"cache_step": [0, 1]}', "step 0 is missing"),
        ("0,x", "neither steps, a mask nor JSON"),
        ("{", "neither steps, a mask nor JSON"),
        ("{}", "no schedule"),
        ("[]", "expected a list"),
        ('{"2": [0, 2, 5]}', "budget 2 has 3 recompute steps"),
        ('{"2": 7}', "expected a list"),
        ('["a", 3]', "."),
        ("null", "."),
        ("[" * 5000, "neither steps, a mask nor JSON"),
        ("101001001", "."),
    ],
)
def test_unusable_text_is_refused_with_its_source(text: str, message: str) -> None:
    with pytest.raises(ScheduleError, match=message) as caught:
        read_schedules(text, 8, "somewhere").schedule(Problem(8), 3)
    assert "somewhere" in str(caught.value)


def test_a_missing_budget_names_those_there_are() -> None:
    with pytest.raises(ScheduleError, match="no schedule for budget 4; it has 2, 3"):
        from_mapping({2: (0, 3), 3: (0, 2, 5)}, 8).schedule(Problem(8), 4)


def test_another_number_of_steps_is_refused() -> None:
    with pytest.raises(ScheduleError, match="for 4 steps, not 8"):
        read_schedules('"1100"', 8, "here").schedule(Problem(8), 2)


def test_an_unreadable_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "schedule"
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ScheduleError, match="cannot be read"):
        read_file(file, 8)
