"""Schedules that the user states: a file, a list or a mask."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recache_compile.errors import ScheduleError
from recache_compile.ir.schedule import Schedule
from recache_compile.policies.base import Problem


@dataclass(frozen=True, slots=True)
class Explicit:
    """One given schedule per budget.

    Args:
        schedules: what was given, in any order.
        source: where it came from, for messages.
    """

    schedules: tuple[Schedule, ...]
    source: str

    def schedule(self, problem: Problem, budget: int) -> Schedule:
        """The given schedule of that budget.

        Raises:
            ScheduleError: none has this budget, or it is for another number of steps.
        """
        for schedule in self.schedules:
            if schedule.budget == budget:
                if schedule.num_steps != problem.num_steps:
                    raise ScheduleError(
                        f"{self.source}: the schedule is for {schedule.num_steps} steps, not {problem.num_steps}"
                    )
                return schedule
        available = ", ".join(str(schedule.budget) for schedule in self.schedules)
        raise ScheduleError(f"{self.source}: no schedule for budget {budget}; it has {available}")


def read_schedules(text: str, num_steps: int, source: str) -> Explicit:
    """Schedules from text.

    Accepted: a mask ("10010…" with one digit a step), steps ("0,4,9"), and JSON: a list
    of steps, a list of 0/1 with one entry a step (cache-dit's `steps_computation_mask`),
    a list of either, an object {budget: steps}, or an object with `cache_step`, the steps
    that are *not* recomputed (BudCache).

    Raises:
        ScheduleError: the text is none of these, or a schedule is not usable.
    """
    stripped = text.strip()
    try:
        if len(stripped) == num_steps and set(stripped) <= {"0", "1"}:
            return Explicit((Schedule.from_mask(stripped),), source)
        data = json.loads(stripped) if stripped[:1] in ("[", "{", '"') else [int(step) for step in stripped.split(",")]
    except (ValueError, RecursionError) as error:
        raise ScheduleError(f"{source}: neither steps, a mask nor JSON ({error})") from None
    try:
        return Explicit(_distinct(_read(data, num_steps)), source)
    except ScheduleError as error:
        raise ScheduleError(f"{source}: {error}") from None


def read_file(file: Path, num_steps: int) -> Explicit:
    """`read_schedules` on a file's text."""
    try:
        return read_schedules(file.read_text(encoding="utf-8"), num_steps, str(file))
    except (OSError, UnicodeDecodeError) as error:
        raise ScheduleError(f"{file}: cannot be read as a schedule ({error})") from None


def from_mapping(schedules: Mapping[int, Sequence[int]], num_steps: int) -> Explicit:
    """Schedules from {budget: recompute steps}."""
    return Explicit(tuple(_by_budget(schedules, num_steps)), "policy")


def _distinct(schedules: list[Schedule]) -> tuple[Schedule, ...]:
    budgets = [schedule.budget for schedule in schedules]
    twice = sorted({budget for budget in budgets if budgets.count(budget) > 1})
    if twice:
        raise ScheduleError(f"more than one schedule for budget {twice[0]}; keep one")
    return tuple(schedules)


def _read(data: Any, num_steps: int) -> list[Schedule]:
    if isinstance(data, str):
        return [Schedule.from_mask(data)]
    if isinstance(data, dict):
        if "cache_step" in data:
            return [_without(_steps(data["cache_step"]), num_steps)]
        return _by_budget(data, num_steps)
    if not isinstance(data, list) or not data:
        raise ScheduleError("expected a list or an object of schedules")
    if any(isinstance(item, (list, str)) for item in data):
        return [schedule for item in data for schedule in _read(item, num_steps)]
    if len(data) == num_steps > 2 and all(item in (0, 1) for item in data):
        return [Schedule.from_mask(data)]
    return [Schedule(_steps(data), num_steps)]


def _without(cached: Sequence[Any], num_steps: int) -> Schedule:
    """The schedule that recomputes all steps but these."""
    if unknown := [step for step in cached if step not in range(num_steps)]:
        raise ScheduleError(f"cached step {unknown[0]!r} is outside 0..{num_steps - 1}")
    return Schedule(tuple(step for step in range(num_steps) if step not in cached), num_steps)


def _steps(data: Any) -> tuple[Any, ...]:
    if not isinstance(data, Sequence) or isinstance(data, str):
        raise ScheduleError(f"expected a list of steps, found {data!r}")
    return tuple(data)


def _by_budget(schedules: Mapping[Any, Sequence[int]], num_steps: int) -> list[Schedule]:
    found = []
    for budget, steps in schedules.items():
        schedule = Schedule(_steps(steps), num_steps)
        if str(schedule.budget) != str(budget):
            raise ScheduleError(f"budget {budget} has {schedule.budget} recompute steps: {list(steps)}")
        found.append(schedule)
    return found
