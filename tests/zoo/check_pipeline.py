"""Compile a pipeline of the zoo, run it on engines, and compare it with itself on its own transformers."""

import contextlib
import functools
import inspect
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from diffusers import DiffusionPipeline

import recache_compile as rc
from recache_compile.pipelines.record import denoisers_of
from tests.families import counted
from tests.zoo.pipelines import BUDGET, NUM_STEPS, PipelineCase

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
        exact: bound of `full_error`.
    """

    full_error: float
    cached: float
    repeated: float
    recomputed: int
    expected: int
    exact: float

    @property
    def is_right(self) -> bool:
        """Whether everything is as it should be."""
        return (
            self.full_error <= self.exact < self.cached < 1.0
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
                policy="uniform", component=name,
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
        exact=case.exact,
    )


def _error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Largest error relative to the largest value; infinite where a value is no number."""
    assert ours.shape == theirs.shape
    difference = (ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-12)
    return float(difference) if bool(torch.isfinite(difference)) else float("inf")


def _expected(case: PipelineCase, schedule: tuple[int, ...]) -> int:
    """Calls of the transformers that a plain pipeline makes in recompute steps, or in the first step of a loop.

    A loop begins where the scheduler's timesteps are set, a step ends where the scheduler is
    called with another timestep than before.
    """
    pipeline: Any = case.make()
    loops: list[Loop] = [Loop()]
    for component, module in denoisers_of(pipeline).items():
        module.register_forward_pre_hook(lambda *_, name=component: loops[-1].calls.append((name, loops[-1].steps)))
    with contextlib.ExitStack() as stack:
        for kind in {type(each) for each in schedulers_of(pipeline)}:
            stack.enter_context(_watching(kind, loops))
        case.draw(pipeline, 0)
    return sum(loop.recomputed(schedule) for loop in loops)


@dataclass(slots=True)
class Loop:
    """One denoising loop.

    Args:
        steps: how many were made so far.
        last: timestep of the last one.
        calls: component and step of every call.
    """

    steps: int = 0
    last: float | None = None
    calls: list[tuple[str, int]] = field(default_factory=list)

    def recomputed(self, schedule: tuple[int, ...]) -> int:
        """How many calls are made in recompute steps; a loop with fewer steps begins in the middle."""
        start = NUM_STEPS - self.steps
        first = dict(reversed(self.calls))
        return sum(at == first[name] or start + at in schedule for name, at in self.calls)


def schedulers_of(pipeline: Any) -> list[Any]:
    """The scheduler of a pipeline, and those of pipelines inside of it, each once."""
    inner = [each for each in vars(pipeline).values() if isinstance(each, DiffusionPipeline)]
    found = [each.scheduler for each in (pipeline, *inner) if getattr(each, "scheduler", None) is not None]
    return list({id(each): each for each in found}.values())


@contextlib.contextmanager
def _watching(kind: Any, loops: list[Loop]) -> Iterator[None]:
    """Note the calls of all schedulers of a class, as pipelines copy theirs."""
    set_timesteps, step = kind.set_timesteps, kind.step

    @functools.wraps(set_timesteps)
    def begin(self: Any, *args: Any, **kwargs: Any) -> Any:
        loops.append(Loop())
        return set_timesteps(self, *args, **kwargs)

    @functools.wraps(step)
    def count(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = inspect.signature(step).bind(self, *args, **kwargs).arguments
        timestep = float(torch.as_tensor(given.get("timestep", loops[-1].steps)).max())
        loops[-1].steps += timestep != loops[-1].last
        loops[-1].last = timestep
        return step(self, *args, **kwargs)

    with mock.patch.object(kind, "set_timesteps", begin), mock.patch.object(kind, "step", count):
        yield
