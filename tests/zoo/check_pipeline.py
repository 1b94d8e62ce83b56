"""Compile a pipeline of the zoo, run it on engines, and compare it with itself on its own transformers."""

import functools
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch

import recache_compile as rc
from recache_compile.pipelines.record import denoisers_of
from tests.families import counted
from tests.zoo.pipelines import BUDGET, NUM_STEPS, PipelineCase

EXACT = 2e-5
"""Bound of the error where every step is recomputed: the same float32 operations, some summed in another order."""

SAME = 1e-6
"""Bound of what two generations differ by: rows of a table against rows on their own."""


@dataclass(frozen=True, slots=True)
class CheckedPipeline:
    """What a case gave; errors are relative to the largest value.

    Args:
        full_error: largest error at budget = T against the pipeline's own transformers, of two prompts in turn.
        cached: difference of budget T/2 from that.
        repeated: difference of two generations at budget T/2, with another prompt between them.
        recomputed: recompute steps at budget T/2, calls of all transformers and branches.
        expected: what the schedules make of the calls of a plain pipeline.
    """

    full_error: float
    cached: float
    repeated: float
    recomputed: int
    expected: int

    @property
    def is_right(self) -> bool:
        """Whether everything is as it should be."""
        return (
            self.full_error <= EXACT
            and self.cached < float("inf")
            and self.repeated <= SAME
            and self.recomputed == self.expected
        )


@torch.no_grad()
def check_pipeline(case: PipelineCase) -> CheckedPipeline:
    """Compile all transformers of a pipeline, and run two prompts in turn under both budgets.

    Raises:
        RecacheError: it cannot be compiled, or a call is refused.
    """
    plain = [case.draw(case.make(), n) for n in (0, 1)]
    calls: Counter[str] = Counter()
    pipeline = case.make()
    parts = {
        name: counted(
            rc.compile(
                pipeline, call=case.arguments(0), budgets=(BUDGET, NUM_STEPS), num_steps=NUM_STEPS, runtime="eager",
                policy="uniform", component=name, **case.compiled,
            ),
            calls,
        )
        for name in denoisers_of(pipeline)
    }  # fmt: skip
    rc.accelerate(pipeline, parts, budget=NUM_STEPS)
    full_error = max(_error(case.draw(pipeline, n), plain[n]) for n in (0, 1, 0))
    calls.clear()
    first = case.draw(pipeline, 0, budget=BUDGET)
    recomputed = calls["recompute"]
    case.draw(pipeline, 1, budget=BUDGET)
    again = case.draw(pipeline, 0, budget=BUDGET)
    schedule = next(iter(parts.values())).schedules[BUDGET].recompute_steps
    return CheckedPipeline(
        full_error=full_error,
        cached=_error(first, plain[0]),
        repeated=_error(again, first),
        recomputed=recomputed,
        expected=_expected(case, schedule),
    )


def _error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Largest error relative to the largest value; infinite where a value is no number."""
    assert ours.shape == theirs.shape
    difference = (ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-12)
    return float(difference) if bool(torch.isfinite(difference)) else float("inf")


def _expected(case: PipelineCase, schedule: tuple[int, ...]) -> int:
    """Calls of the transformers that a plain pipeline makes in recompute steps, or in the first step of one of them.

    The steps are counted by the calls of `scheduler.step`.
    """
    pipeline: Any = case.make()
    steps_done = 0
    called: dict[str, list[int]] = {component: [] for component in denoisers_of(pipeline)}
    scheduler_step = pipeline.scheduler.step

    @functools.wraps(scheduler_step)
    def step(*args: Any, **kwargs: Any) -> Any:
        nonlocal steps_done
        steps_done += 1
        return scheduler_step(*args, **kwargs)

    pipeline.scheduler.step = step
    for component, module in denoisers_of(pipeline).items():
        module.register_forward_pre_hook(lambda *_, at=called[component]: at.append(steps_done))
    case.draw(pipeline, 0)
    start = NUM_STEPS - steps_done
    return sum(at == steps[0] or start + at in schedule for steps in called.values() if steps for at in steps)

