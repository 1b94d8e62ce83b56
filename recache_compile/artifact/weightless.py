"""Plan without weights: what would compiling a model give, in MACs, parameters and bytes?"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from rich.console import Console
from torch import nn

from recache_compile.artifact.inspect import (
    BudgetFacts,
    ProgramFacts,
    budget_facts,
    print_budgets,
    print_programs,
    program_facts,
    table,
    with_unit,
)
from recache_compile.artifact.specs import (
    WeightlessModel,
    find_spec_file,
    known_specs,
    on_meta,
    read_spec,
    transformer_class,
)
from recache_compile.capture.capture import Captured, capture
from recache_compile.compiler.build import Options
from recache_compile.compiler.split import annotate, cache_points, specialise
from recache_compile.errors import ModelError, PassError
from recache_compile.ir.cost import cost_of, count_macs
from recache_compile.ir.meta import tensor_of
from recache_compile.ir.plan import make_plan
from recache_compile.ir.program import Granularity
from recache_compile.ir.value import Kind

META = torch.device("meta")
ORDERS = (0, 1, 2, 3)


@dataclass(frozen=True, slots=True)
class SiteFacts:
    """The cache sites of one granularity.

    Args:
        granularity: where they are.
        sites: how many; 0 where the model has none, and `reason` says why.
        bytes_per_anchor: their features of one recompute step, for one guidance branch.
        history_bytes: by forecaster order m, the m + 1 anchors that are held.
        reason: why there are none.
    """

    granularity: str
    sites: int
    bytes_per_anchor: int
    history_bytes: dict[int, int]
    reason: str = ""


@dataclass(frozen=True, slots=True)
class PlanFacts:
    """All that `plan` shows.

    Args:
        model, size, num_steps: what is planned for.
        forecaster, order, granularity: the choices that programs and budgets are for.
        parameters: of the model.
        step_parameters: read by the recompute step; the others run once per generation.
        call_macs: multiply-accumulates of one call of the original.
        boundary: bytes of every prologue output, of one row where it has rows.
        row_tables: names of those outputs that have rows.
        sites, programs, budgets: see there.
    """

    model: str
    size: str
    num_steps: int
    forecaster: str
    order: int
    granularity: str
    parameters: int
    step_parameters: int
    call_macs: int
    boundary: dict[str, int]
    row_tables: tuple[str, ...]
    sites: tuple[SiteFacts, ...]
    programs: tuple[ProgramFacts, ...]
    budgets: tuple[BudgetFacts, ...]


def find_weightless(model: str, num_steps: int, call: Mapping[str, Any]) -> WeightlessModel:
    """A model on the meta device and one call of it.

    Args:
        model: a spec's name or file, or what `load_pipeline` takes; then the pipeline is run
            with a stand-in for its transformer, whose weights are not loaded; those of its
            text encoders are.
        num_steps: length of the denoising loop, for pipelines.
        call: arguments of the pipeline.

    Raises:
        ModelError: there is no such model.
    """
    file = find_spec_file(model)
    if file is not None:
        return read_spec(file)
    from recache_compile.pipelines.load import load_config, load_pipeline
    from recache_compile.pipelines.record import DENOISER, record_examples

    try:
        index = load_config(model)
    except ModelError as error:
        raise ModelError(f"{error}; models that come with the package: {', '.join(known_specs())}") from error
    entry = index.get(DENOISER)
    if not isinstance(entry, (list, tuple)) or len(entry) != 2 or not isinstance(entry[1], str):
        raise ModelError(f"model {model}: its pipeline has no {DENOISER}")
    cls: Any = transformer_class(entry[1])
    config = load_config(model, DENOISER)
    try:
        with torch.device("meta"):
            module = cls.from_config(config).eval()
    except Exception as error:  # whatever a constructor raises
        raise ModelError(f"model {model}: {entry[1]} does not take its config: {error}") from error
    example = record_examples(load_pipeline(model, transformer=module), num_steps, call)[0]
    return WeightlessModel(model, "", num_steps, module, on_meta(dict(example.inputs)))


def plan_model(
    abstract: WeightlessModel, options: Options, report: Callable[[str], None] = lambda stage: None
) -> PlanFacts:
    """Capture, specialise and count; nothing is lowered and no weight is needed.

    Raises:
        RecacheError: the model cannot be captured or split.
    """
    report("capturing")
    captured = capture(abstract.module, abstract.inputs, options.roles)
    report("finding cache sites")
    sites = tuple(_site_facts(captured, options, granularity) for granularity in Granularity)
    annotated = annotate(captured, options.config)
    programs = specialise(annotated, options.config)
    report("counting")
    macs = count_macs(captured.program, META)
    num_sites = len(cache_points(annotated))
    plans = {budget: make_plan(each, options.forecaster, num_sites) for budget, each in options.schedules.items()}
    prologue = programs.get("prologue")
    names = {name for name, _ in abstract.module.named_parameters()}
    return PlanFacts(
        model=abstract.name,
        size=abstract.size,
        num_steps=options.num_steps,
        forecaster=options.forecaster.name,
        order=options.forecaster.order,
        granularity=options.granularity.value,
        parameters=_count(abstract.module),
        step_parameters=sum(weight.numel() for name, weight in programs["recompute"].weights.items() if name in names),
        call_macs=macs,
        boundary={value.name: value.nbytes for value in prologue.outputs} if prologue else {},
        row_tables=tuple(value.name for value in prologue.outputs if value.kind is Kind.TABLE) if prologue else (),
        sites=sites,
        programs=tuple(program_facts(program, META) for program in programs.values()),
        budgets=tuple(
            budget_facts(budget, plan, cost_of(plan, programs, META, macs)) for budget, plan in plans.items()
        ),
    )


def _site_facts(captured: Captured, options: Options, granularity: Granularity) -> SiteFacts:
    try:
        points = cache_points(annotate(captured, replace(options.config, granularity=granularity, residual=None)))
    except PassError as error:
        return SiteFacts(granularity.value, 0, 0, {}, str(error))
    size = sum(tensor_of(point).nbytes for point in points)
    return SiteFacts(granularity.value, len(points), size, {order: size * (order + 1) for order in ORDERS})


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def print_plan(facts: PlanFacts, console: Console) -> None:
    """Tables for people."""
    hoisted = 1 - facts.step_parameters / max(1, facts.parameters)
    console.print(
        f"{facts.model} {facts.size}, {facts.num_steps} steps, {facts.forecaster} order {facts.order},"
        f" {facts.granularity} sites\n{with_unit(facts.parameters)} parameters, {hoisted:.1%} of them out of the steps;"
        f" {with_unit(facts.call_macs)} MACs a call",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    sites = table(
        "cache memory of one guidance branch",
        ">sites",
        ">an anchor",
        *(f">order {m}" for m in ORDERS),
        first="granularity",
    )
    for each in facts.sites:
        held = [with_unit(each.history_bytes[order]) + "B" for order in ORDERS] if each.sites else ["none"]
        sites.add_row(each.granularity, str(each.sites), with_unit(each.bytes_per_anchor) + "B", *held)
    console.print(sites)
    print_programs(facts.programs, console)
    print_budgets(facts.budgets, console)
    for name, size in facts.boundary.items():
        console.print(
            f"{name}: {with_unit(size)}B{' a row' if name in facts.row_tables else ''}", highlight=False, markup=False
        )
