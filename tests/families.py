"""The tiny pipelines compiled, once each for the whole session, on engines that count their calls."""

import functools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

import recache_compile as rc
from recache_compile.pipelines.record import denoisers_of
from recache_compile.runtimes.base import Engine
from tests.tiny_pipelines import PIPELINES, TinyPipeline, draw, stack

STEPS = 8
BUDGET = 3

EXACT = 1e-5
"""Bound of the error where every step is recomputed, relative to the largest value.

The engines do the pipeline's own float32 operations, but sum some of them in another order:
the prologue computes the rows of all steps at once.  Each step so adds a few units in the
last place (1.2e-7), which guidance multiplies by at most 2 * 4 - 1; 6e-7 is the most that was
seen.  A cached step, the timestep of another step or the history of another branch shows at
1e-3 or more.
"""

SAME = 1e-6
"""Bound of what two runs of the same engines differ by: rows of a table against rows on their own."""

DIFFERENT = 100 * EXACT
"""What other prompts and cached steps differ by at least."""

QUICK = ("flux", "sd3", "wan-2.1", "qwen-image")
"""Those whose tests are not marked as slow."""

BATCHED = ("flux", "sd3", "wan-2.1")
"""Those that are compiled for two prompts in a batch as well."""

SAME_TRANSFORMER = {"sd3-img2img": "sd3"}
"""Pipelines that run on what was compiled for another one."""

TINY = {tiny.name: tiny for tiny in PIPELINES}
TALL = {"height": 32, "width": 16}
"""Another size, which flux is compiled for as well."""

Change = Callable[[Any], None]
"""Changes a new pipeline before it is used."""


@dataclass(frozen=True, slots=True)
class Family:
    """A pipeline and its compiled transformers, with their counted engine calls, by component."""

    tiny: TinyPipeline
    parts: Mapping[str, rc.Compiled]
    calls: Mapping[str, Counter[str]]

    def pipeline(self, budget: int | None = STEPS, tiny: TinyPipeline | None = None, **options: Any) -> Any:
        """A new pipeline on the engines: this family's, or another one that has the same transformer."""
        return rc.accelerate((tiny or self.tiny).make(), self.parts, budget=budget, **options)

    @property
    def recompute_steps(self) -> tuple[int, ...]:
        """The schedule of the small budget."""
        return self.parts["transformer"].schedules[BUDGET].recompute_steps

    def recomputed(self) -> dict[str, int]:
        """Calls of the recompute engines since this was last asked."""
        seen = {component: calls["recompute"] for component, calls in self.calls.items()}
        for calls in self.calls.values():
            calls.clear()
        return seen


@functools.cache
def family(name: str) -> Family:
    """Compile a pipeline once, for all the kinds of calls that the tests make."""
    tiny = TINY[name]
    if name in SAME_TRANSFORMER:
        return replace(family(SAME_TRANSFORMER[name]), tiny=tiny)
    calls = [tiny.call(0), *([tiny.unguided(0)] if tiny.unguided else [])]
    if name in BATCHED:
        calls.append(stack(tiny.call(0), tiny.call(1)))
    if name == "flux":
        calls.append(tiny.call(0) | TALL)
    counters: dict[str, Counter[str]] = {component: Counter() for component in denoisers_of(tiny.make())}
    parts = {
        component: counted(compile_tiny(tiny, calls, component=component, fixed_sizes=True), calls_made)
        for component, calls_made in counters.items()
    }
    return Family(tiny, parts, counters)


def unchanged(pipeline: Any) -> None:
    """The change that is none."""


def compile_tiny(
    tiny: TinyPipeline,
    calls: Mapping[str, Any] | Sequence[Mapping[str, Any]],
    change: Change = unchanged,
    **options: Any,
) -> rc.Compiled:
    """Compile a transformer of a tiny pipeline with the defaults of these tests."""
    pipeline = tiny.make()
    change(pipeline)
    options = {"budgets": (BUDGET, STEPS), "num_steps": STEPS, "runtime": "eager", "policy": "uniform"} | options
    return rc.compile(pipeline, call=calls, **options)


@dataclass(frozen=True, slots=True)
class Counting(Engine):
    """An engine whose calls are counted."""

    name: str
    engine: Engine
    calls: Counter[str]

    def __call__(self, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        self.calls[self.name] += 1
        return self.engine(inputs)

    def use(self, weights: Mapping[str, Tensor]) -> None:
        self.engine.use(weights)


def counted(compiled: rc.Compiled, calls: Counter[str]) -> rc.Compiled:
    """The same compiled model with engines that count their calls."""

    variants = tuple(
        replace(each, engines={name: Counting(name, engine, calls) for name, engine in each.engines.items()})
        for each in compiled.variants
    )
    return replace(compiled, engines=replace(compiled.engines, variants=variants))


def plain(tiny: TinyPipeline, call: Mapping[str, Any], change: Change = unchanged, **options: Any) -> Tensor:
    """What the pipeline's own transformers give."""
    pipeline = tiny.make()
    change(pipeline)
    return draw(pipeline, call, **{"num_steps": STEPS} | options)


def error(ours: Tensor, theirs: Tensor) -> float:
    """Largest error relative to the largest value."""
    assert ours.shape == theirs.shape
    return float((ours - theirs).abs().max() / theirs.abs().max())


def expected_recomputes(tiny: TinyPipeline, call: Mapping[str, Any], recompute_steps: Sequence[int]) -> dict[str, int]:
    """Calls of each transformer that are made in its first step or in one of the schedule.

    The steps are counted by the calls of `scheduler.step` in a plain pipeline.
    """
    pipeline = tiny.make()
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
    draw(pipeline, call, STEPS)
    start = STEPS - steps_done
    return {
        component: sum(at == steps[0] or start + at in recompute_steps for at in steps)
        for component, steps in called.items()
    }
