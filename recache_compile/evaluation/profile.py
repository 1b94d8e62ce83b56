"""Where the time of a generation goes, and how redundant its steps are."""

import copy
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import fx

from recache_compile.api import compile
from recache_compile.compiled import Compiled
from recache_compile.errors import RecacheError
from recache_compile.evaluation.setting import Setting
from recache_compile.measure import seconds
from recache_compile.program import Kind
from recache_compile.recording import prompted
from recache_compile.runtimes.dispatcher import Dispatcher
from recache_compile.runtimes.watch import Watch
from recache_compile.stand_in import CompiledTransformer


@dataclass(frozen=True, slots=True)
class Timed:
    """Seconds of one pipeline call; medians.

    Args:
        total: of the whole call.
        steps: of the transformer's part of every step, guidance branches together; empty where unknown.
        recompute_steps: those of the schedule that was run.
    """

    total: float
    steps: tuple[float, ...] = ()
    recompute_steps: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Profile:
    """What one batch tells.

    Args:
        original: the pipeline as it came, uncached and not compiled; None where its weights are not here.
        budgets: on the engines, by budget; T recomputes every step.
        sites: name of every cache site at granularity "block".
        changes: relative L1 change of each site's feature from the step before (sites, T).
    """

    original: Timed | None
    budgets: Mapping[int, Timed]
    sites: tuple[str, ...] = ()
    changes: tuple[tuple[float | None, ...], ...] = ()

    def speedup(self, budget: int) -> float | None:
        """Of the whole call, over the original's."""
        return None if self.original is None else self.original.total / self.budgets[budget].total


@dataclass(slots=True)
class _Stopwatch:
    """A dispatcher that is timed."""

    dispatcher: Dispatcher
    spent: dict[int, float]

    def __call__(self, *, step: int, **inputs: Any) -> Any:
        results = []
        taken = seconds(lambda: results.append(self.dispatcher(step=step, **inputs)))
        self.spent[step] = self.spent.get(step, 0.0) + taken
        return results[0]

    def reset(self, start: int | None = 0) -> None:
        self.dispatcher.reset(start)


def profile(
    setting: Setting, pipeline: Any, compiled: Compiled, repeats: int, report: Callable[[str], None]
) -> Profile:
    """Time the original and every budget in turn on the first batch, then watch the features of one generation.

    Args:
        setting: what is evaluated.
        pipeline: with its transformer, where it is here; left as it is.
        compiled: has the budgets, and one that recomputes every step.
        repeats: timed calls of each; one more warms up.
        report: told what begins.
    """
    report("timing")
    pipeline = copy.copy(pipeline)
    pipeline.set_progress_bar_config(disable=True)
    calls: dict[int | None, Callable[[], dict[int, float]]] = {
        budget: _on_engines(setting, pipeline, compiled, compiled.dispatcher(budget)) for budget in compiled.plans
    }
    has_original = getattr(pipeline, setting.component) is not None
    if has_original:
        calls[None] = partial(_draw, setting, pipeline)
    totals: dict[int | None, list[float]] = {budget: [] for budget in calls}
    steps: dict[int | None, list[dict[int, float]]] = {budget: [] for budget in calls}
    for number in range(repeats + 1):
        for budget, call in calls.items():
            compiled.revision.number += 1  # every generation runs its prologue
            taken = seconds(lambda call=call, budget=budget: steps[budget].append(call()))  # type: ignore[misc]
            if number:
                totals[budget].append(taken)
    timed = {
        budget: Timed(
            statistics.median(totals[budget]),
            tuple(statistics.median(each[step] for each in steps[budget][1:]) for step in sorted(steps[budget][0])),
            () if budget is None else compiled.schedules[budget].recompute_steps,
        )
        for budget in calls
    }
    original, on_engines = timed.get(None), {budget: each for budget, each in timed.items() if budget is not None}
    sites, changes = _redundancy(setting, pipeline, report) if has_original else ((), ())
    return Profile(original, on_engines, sites, changes)


def call_of(setting: Setting, pipeline: Any) -> dict[str, Any]:
    """Arguments of the pipeline call that makes the first batch, but for its noise."""
    return prompted(pipeline, list(setting.batch(0).prompts), setting.call)


def _draw(setting: Setting, pipeline: Any) -> dict[int, float]:
    """The first batch, with whatever is in the transformer's place; nothing is known of the steps."""
    noise = [torch.Generator().manual_seed(seed) for seed in setting.batch(0).seeds]
    steps = setting.num_steps
    pipeline(**call_of(setting, pipeline), num_inference_steps=steps, generator=noise, output_type="pt")
    return {}


def _on_engines(
    setting: Setting, pipeline: Any, compiled: Compiled, dispatcher: Dispatcher
) -> Callable[[], dict[int, float]]:
    """A call of the pipeline with a dispatcher in its transformer's place; it tells the seconds of each step."""
    pipeline = copy.copy(pipeline)
    watch: Any = _Stopwatch(dispatcher, {})
    stand_in = CompiledTransformer(compiled, pipeline, min(compiled.plans), dispatcher=watch)
    setattr(pipeline, setting.component, stand_in)

    def call() -> dict[int, float]:
        watch.spent.clear()
        with stand_in.generation(pipeline):
            _draw(setting, pipeline)
        return dict(watch.spent)

    return call


def _redundancy(
    setting: Setting, pipeline: Any, report: Callable[[str], None]
) -> tuple[tuple[str, ...], tuple[tuple[float | None, ...], ...]]:
    """Names of the blocks' outputs, and how much what each block adds changes over one uncached generation."""
    try:
        blocks = compile(
            pipeline, None, (1,), setting.num_steps, "reuse", 0, "uniform", "block", "eager", hoist=False,
            call=call_of(setting, pipeline), component=setting.component,
            report=lambda stage: report(f"redundancy of the blocks: {stage}"),
        )  # fmt: skip
    except RecacheError as error:  # a model without repeated blocks
        report(f"redundancy of the blocks: left out: {error}")
        return (), ()
    program = blocks.variants[0].programs["recompute"]
    results: Any = program.module.graph.output_node().args[0]
    features = [
        (_block_of(node), value.shape)
        for node, value in zip(results, program.outputs, strict=True)
        if value.kind is Kind.FEATURE
    ]
    owners = [owner for owner, _ in features]
    names = [f"{owner} {list(shape)}" if owners.count(owner) > 1 else owner for owner, shape in features]
    watch = Watch(len(names), setting.num_steps, blocks.variants, blocks.signature, blocks.revision)
    report("redundancy of the blocks: watching one generation")
    _on_engines(setting, pipeline, blocks, watch)()
    return tuple(names), tuple(map(tuple, watch.changes()))


def _block_of(feature: fx.Node) -> str:
    """Name of the block that made a feature: "transformer_blocks.3"."""
    node = feature
    while node.all_input_nodes:
        for path, _ in node.meta.get("nn_module_stack", {}).values():
            if path.rpartition(".")[2].isdigit():
                return str(path)
        node = node.all_input_nodes[0]
    return feature.name
