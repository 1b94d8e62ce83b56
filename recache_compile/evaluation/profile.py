"""Where the time of a generation goes, and how redundant its steps are."""

import copy
import logging
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import fx

from recache_compile.compiler.compiled import Compiled
from recache_compile.errors import RecacheError, reason_of
from recache_compile.evaluation.measure import seconds
from recache_compile.evaluation.setting import Setting
from recache_compile.ir.meta import block_of
from recache_compile.ir.program import Granularity
from recache_compile.ir.value import Kind
from recache_compile.pipelines.accelerate import put_in
from recache_compile.pipelines.engines import engines_of_pipeline
from recache_compile.pipelines.record import prompted
from recache_compile.pipelines.transformer import CompiledTransformer
from recache_compile.runtimes.dispatcher import Dispatcher
from recache_compile.runtimes.dispatcher_observer import FeatureChanges
from recache_compile.support.machine import machine, versions

log = logging.getLogger(__name__)

PROFILE = "profile.json"


@dataclass(frozen=True, slots=True)
class Timed:
    """Seconds of one pipeline call; medians.

    Args:
        total: of the whole call.
        spread: the fastest and the slowest.
        steps: of the transformer's part of every step, guidance branches together, in calls of their own.
        recompute_steps: those of the schedule that was run.
    """

    total: float
    spread: tuple[float, float]
    steps: tuple[float, ...] = ()
    recompute_steps: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Redundancy:
    """How much the blocks' outputs change.

    Args:
        sites: names of the blocks, with the output's shape where a block has several.
        changes: relative L1 change of each site's feature from the step before (sites, T).
    """

    sites: tuple[str, ...]
    changes: tuple[tuple[float | None, ...], ...]


@dataclass(frozen=True, slots=True)
class Profile:
    """What one batch tells.

    Args:
        machine, versions, repeats: where, with what and how often it was measured.
        original: the pipeline as it came, uncached and not compiled.
        budgets: on the engines, by budget; T recomputes every step.  Policies differ in nothing here.
        redundancy: None before it is known, and where it cannot be.
    """

    machine: str
    versions: Mapping[str, str]
    repeats: int
    original: Timed
    budgets: Mapping[int, Timed]
    redundancy: Redundancy | None = None

    def speedup(self, budget: int) -> float:
        """Of the whole call, over the original's."""
        return self.original.total / self.budgets[budget].total


@dataclass(slots=True)
class _Stopwatch:
    """A dispatcher whose calls are timed; all else is the dispatcher's own."""

    dispatcher: Dispatcher
    spent: dict[int, float]

    def __call__(self, *, step: int, **inputs: Any) -> Any:
        results = []
        taken = seconds(lambda: results.append(self.dispatcher(step=step, **inputs)))
        self.spent[step] = self.spent.get(step, 0.0) + taken
        return results[0]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.dispatcher, name)


def measure_times(setting: Setting, pipeline: Any, compiled: Compiled, repeats: int) -> Profile:
    """Time the original and every budget in turn on the first batch.

    Args:
        setting: what is evaluated.
        pipeline: with its transformer; left as it is.
        compiled: has the budgets, and one that recomputes every step.
        repeats: timed calls of each; one more warms up.
    """
    log.info("timing")
    pipeline = copy.copy(pipeline)
    pipeline.set_progress_bar_config(disable=True)
    calls: dict[int, _OnEngines] = {
        budget: _OnEngines(setting, pipeline, compiled, compiled.dispatcher(budget)) for budget in compiled.plans
    }
    every: Mapping[int | None, Callable[[], Any]] = {None: partial(_draw, setting, pipeline)} | calls  # type: ignore[operator]
    totals: dict[int | None, list[float]] = {budget: [] for budget in every}
    for _ in range(repeats + 1):
        for budget, call in every.items():
            compiled.engines.revision.number += 1  # every generation runs its prologue
            totals[budget].append(seconds(call))
    timed = {
        budget: Timed(statistics.median(taken[1:]), (min(taken[1:]), max(taken[1:])))
        for budget, taken in totals.items()
    }
    budgets = {}
    for budget, call in calls.items():
        compiled.engines.revision.number += 1
        steps = [call.steps() for _ in range(repeats)]
        medians = tuple(statistics.median(each[step] for each in steps) for step in sorted(steps[0]))
        shown = compiled.schedules[budget].recompute_steps
        budgets[budget] = replace(timed[budget], steps=medians, recompute_steps=shown)
    return Profile(machine(setting.config.device), versions(), repeats, timed[None], budgets)


def call_of(setting: Setting, pipeline: Any) -> dict[str, Any]:
    """Arguments of the pipeline call that makes the first batch, but for its noise."""
    return prompted(pipeline, list(setting.batch(0).prompts), setting.config.call)


def _draw(setting: Setting, pipeline: Any) -> None:
    """The first batch, with whatever is in the transformer's place."""
    noise, steps = [torch.Generator().manual_seed(seed) for seed in setting.batch(0).seeds], setting.num_steps
    pipeline(**call_of(setting, pipeline), num_inference_steps=steps, generator=noise, output_type="pt")


class _OnEngines:
    """A call of the pipeline with a dispatcher in its transformer's place."""

    def __init__(self, setting: Setting, pipeline: Any, compiled: Compiled, dispatcher: Dispatcher) -> None:
        self._setting, self._pipeline = setting, copy.copy(pipeline)
        self._transformers = []
        self._stopwatch: Any = _Stopwatch(dispatcher, {})
        each: Any
        for each in (dispatcher, self._stopwatch):
            transformer = CompiledTransformer(compiled, self._pipeline, min(compiled.plans), dispatcher=each)
            self._transformers.append(transformer)

    def __call__(self) -> None:
        self._run(self._transformers[0])

    def steps(self) -> dict[int, float]:
        """Seconds of each step, in a call in which each is waited for."""
        self._stopwatch.spent.clear()
        self._run(self._transformers[1])
        return dict(self._stopwatch.spent)

    def _run(self, transformer: CompiledTransformer) -> None:
        put_in(self._pipeline, {self._setting.config.component: transformer})
        _draw(self._setting, self._pipeline)


def measure_redundancy(setting: Setting, pipeline: Any) -> Redundancy | None:
    """How much what each block adds changes over one uncached generation of the first sample.

    It takes a model with repeated blocks, and memory for two steps' features of all of them.
    """
    config = replace(
        setting.config, anchors=1, granularity=Granularity.BLOCK, residual=None, hoist=False, runtime="eager"
    )
    one = replace(setting, config=config, batch_size=1)
    pipeline = copy.copy(pipeline)
    pipeline.set_progress_bar_config(disable=True)
    try:
        log.info("redundancy of the blocks")
        blocks = engines_of_pipeline(pipeline, config, [call_of(one, pipeline)])
        program = blocks.variants[0].programs["recompute"]
        results: Any = program.module.graph.output_node().args[0]
        features = [
            (_owner_of(node), value.shape)
            for node, value in zip(results, program.outputs, strict=True)
            if value.kind is Kind.FEATURE
        ]
        changes = FeatureChanges(one.num_steps)
        log.info("redundancy of the blocks: watching one generation")
        every = blocks.uncached()
        _OnEngines(one, pipeline, every, every.dispatcher(one.num_steps, [changes]))()
    except (RecacheError, MemoryError, torch.OutOfMemoryError) as error:
        log.info("redundancy of the blocks: left out: %s", reason_of(error))
        return None
    owners = [owner for owner, _ in features]
    names = [f"{owner} {list(shape)}" if owners.count(owner) > 1 else owner for owner, shape in features]
    return Redundancy(tuple(names), tuple(map(tuple, changes.changes())))


def _owner_of(feature: fx.Node) -> str:
    """Name of the block that made a feature: "transformer_blocks.3"."""
    node = feature
    while node.all_input_nodes:
        if (block := block_of(node)) is not None:
            return block
        node = node.all_input_nodes[0]
    return feature.name
