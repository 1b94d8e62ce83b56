"""Compare policies: the schedules that each gives for the same budgets."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from recache_compile.config import CompileConfig
from recache_compile.errors import ScheduleError
from recache_compile.ir.forecasters import Forecaster, check_forecaster, get_forecaster
from recache_compile.ir.schedule import Schedule, check_budgets
from recache_compile.pipelines.engines import engines_of_pipeline
from recache_compile.policies.base import Calibration, Policy, Problem, make_schedules
from recache_compile.policies.registry import get_policy
from recache_compile.policies.surrogate import Surrogate
from recache_compile.search.default_policy import calibrate_pipeline, calibration_calls

ByPolicy = Mapping[str, Mapping[int, Schedule]]
"""Schedules by policy and budget."""


@dataclass(frozen=True, slots=True)
class Compared:
    """What several policies answer to the same question.

    Args:
        num_steps: length T of the denoising loop.
        forecaster, order: fill the cached steps.
        policies: schedules by policy and budget.
        errors: the surrogate's, in the same places; None without a calibration.
    """

    num_steps: int
    forecaster: str
    order: int
    policies: ByPolicy
    errors: Mapping[str, Mapping[int, float]] | None


@dataclass(frozen=True, slots=True)
class _ProblemWithoutModel(Problem):
    """Sends those who need a model to the option that names one."""

    def need_calibration(self, policy: str) -> Calibration:
        """Raise `ScheduleError` with that option."""
        raise ScheduleError(f"policy {policy}: needs a few uncached generations of a model; name one with --model")


@dataclass(frozen=True, slots=True)
class Question:
    """What policies are asked.

    Args:
        policies: by the name that the user gave them.
        budgets: numbers of recompute steps k.
        num_steps: length T of the denoising loop.
        forecaster, order: fill the cached steps.
    """

    policies: Mapping[str, Policy]
    budgets: tuple[int, ...]
    num_steps: int
    forecaster: str
    order: int


def make_question(
    policies: Sequence[str], budgets: Sequence[int | float], num_steps: int, forecaster: str, order: int
) -> Question:
    """A question, all of it checked before a model is loaded; policies as of `get_policy`.

    Raises:
        ScheduleError: one of them is unknown, out of range or repeated.
    """
    check_forecaster(forecaster, order)
    found: dict[str, Policy] = {}
    for name in policies:
        if name in found:
            raise ScheduleError(f"policy {name}: is repeated; name each once")
        found[name] = get_policy(name, num_steps)
    return Question(found, check_budgets(budgets, num_steps), num_steps, forecaster, order)


def calibration_of(pipeline: Any, captions: Sequence[str], num_steps: int) -> Calibration:
    """Statistics of a few uncached generations; no forecaster has a part in them.

    Args:
        pipeline: a `diffusers` pipeline; it is left as it is.
        captions: prompts, taken in turn.
        num_steps: length T of the denoising loop.

    Raises:
        RecacheError: the pipeline cannot be compiled or run.
    """
    calls = calibration_calls(pipeline, captions, {})
    config = CompileConfig(num_steps=num_steps, anchors=1, runtime="eager")
    return calibrate_pipeline(pipeline, engines_of_pipeline(pipeline, config, calls[:1]), calls)


def compare_policies(question: Question, calibration: Calibration | None = None) -> Compared:
    """Ask every policy for every budget, and the surrogate for their errors.

    Args:
        question: what is asked.
        calibration: of the model that the schedules are for.

    Raises:
        ScheduleError: a policy needs more than is known here, or breaks its promise.
    """
    num_steps = question.num_steps
    forecaster = _forecaster(question, calibration)
    kind = _ProblemWithoutModel if calibration is None else Problem
    problem = kind(num_steps, forecaster, calibration)
    schedules = {name: make_schedules(policy, question.budgets, problem) for name, policy in question.policies.items()}
    errors = None if calibration is None else _errors(schedules, Surrogate(calibration, forecaster))
    return Compared(num_steps, forecaster.name, forecaster.order, schedules, errors)


def facts_of(compared: Compared) -> dict[str, Any]:
    """What `--json` prints of them."""
    return {
        "num_steps": compared.num_steps,
        "forecaster": compared.forecaster,
        "order": compared.order,
        "policies": {
            name: {budget: schedule.recompute_steps for budget, schedule in schedules.items()}
            for name, schedules in compared.policies.items()
        },
        "errors": compared.errors,
    }


def print_compared(compared: Compared, console: Console) -> None:
    """A table for people: every schedule as a timeline, with its steps below."""
    title = f"{compared.num_steps} steps, {compared.forecaster} order {compared.order}"
    title += "" if compared.errors is None else "; error: the surrogate's guess"
    table = Table(title=escape(title), title_justify="left", box=None, pad_edge=False, padding=(0, 1, 0, 0))
    timelines, others = min(compared.num_steps, 50), 8 if compared.errors is None else 16
    table.add_column("policy", overflow="fold", max_width=max(8, console.width - timelines - others))
    table.add_column("budget", justify="right")
    table.add_column("recompute steps", overflow="fold", min_width=timelines)
    if compared.errors is not None:
        table.add_column("error", justify="right")
    for name, schedules in compared.policies.items():
        for row, (budget, schedule) in enumerate(schedules.items()):
            error = [] if compared.errors is None else [f"{compared.errors[name][budget]:.3g}"]
            steps = f"{timeline(schedule)}\n{' '.join(map(str, schedule.recompute_steps))}"
            table.add_row("" if row else escape(name), str(budget), steps, *error)
        table.add_row()
    console.print(table, highlight=False)


def timeline(schedule: Schedule) -> str:
    """One character a step, as in █··█·."""
    return schedule.mask.replace("1", "█").replace("0", "·")


def _forecaster(question: Question, calibration: Calibration | None) -> Forecaster:
    if question.forecaster == "fitted" and calibration is None:
        raise ScheduleError("forecaster fitted: needs a few uncached generations of a model; name one with --model")
    gram = None if calibration is None else calibration.gram
    return get_forecaster(question.forecaster, question.order, gram)


def _errors(schedules: ByPolicy, surrogate: Surrogate) -> dict[str, dict[int, float]]:
    return {
        name: dict(zip(of_policy, map(float, surrogate.errors(list(of_policy.values()))), strict=True))
        for name, of_policy in schedules.items()
    }
