from pathlib import Path

import pytest

from recache_compile.errors import ScheduleError
from recache_compile.policies.base import Problem
from recache_compile.policies.front_loaded import FrontLoaded
from recache_compile.policies.registry import get_policy
from recache_compile.policies.uniform import Uniform


def test_names_with_options() -> None:
    assert get_policy("uniform", 50) == Uniform()
    assert get_policy("uniform:warmup=3", 50) == Uniform(warmup=3)
    assert get_policy("front-loaded:power=2.5", 50) == FrontLoaded(power=2.5)


def test_a_policy_object_is_taken_as_it_is() -> None:
    policy = Uniform(2)
    assert get_policy(policy, 50) is policy


def test_files_and_texts(tmp_path: Path) -> None:
    file = tmp_path / "schedule.json"
    file.write_text("[0, 2, 5]")
    for choice in (str(file), "0,2,5", "10100100", {3: (0, 2, 5)}):
        assert get_policy(choice, 8).schedule(Problem(8), 3).recompute_steps == (0, 2, 5)


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ("unifrm", "neither a policy"),
        ("uniform:speed=3", "no option 'speed'"),
        ("uniform:warmup", "expected warmup= and a whole number"),
        ("uniform:warmup=2.0", "expected warmup= and a whole number"),
        ("front-loaded:power=x", "expected power= and a number"),
        ("x" * 500, "neither a policy"),
        ("0," * 300, "neither steps, a mask nor JSON"),
    ],
)
def test_unknown_choices_are_refused(choice: str, message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        get_policy(choice, 8)
