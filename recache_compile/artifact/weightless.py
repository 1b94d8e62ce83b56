"""Plan without weights: what would compiling a model give, in MACs, parameters and bytes?"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace

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
from recache_compile.artifact.specs import WeightlessModel
from recache_compile.capture.capture import Captured, capture
from recache_compile.compiler.split import annotate, cache_points, specialise
from recache_compile.config import CompileConfig
from recache_compile.errors import PassError
from recache_compile.ir.cost import cost_of, count_macs
from recache_compile.ir.forecasters import Forecaster
from recache_compile.ir.meta import tensor_of
from recache_compile.ir.plan import make_plan
from recache_compile.ir.program import Granularity
from recache_compile.ir.schedule import Schedule
from recache_compile.ir.value import Kind

log = logging.getLogger(__name__)

META = torch.device("meta")
ORDERS = (0, 1, 2, 3)


@dataclass(frozen=True, slots=True)
class GranularityFacts:
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
        model, size: what is planned for.
        config, forecaster, order: the choices that programs and budgets are for.
        parameters: of the model.
        step_parameters: read by the recompute step; the others run once per generation.
        call_macs: multiply-accumulates of one call of the original.
        boundary: bytes of every prologue output, of one row where it has rows.
        row_tables: names of those outputs that have rows.
        sites, programs, budgets: see there.
    """

    model: str
    size: str
    config: CompileConfig
    forecaster: str
    order: int
    parameters: int
    step_parameters: int
    call_macs: int
    boundary: dict[str, int]
    row_tables: tuple[str, ...]
    sites: tuple[GranularityFacts, ...]
    programs: tuple[ProgramFacts, ...]
    budgets: tuple[BudgetFacts, ...]


def plan_weightless(
    model: WeightlessModel, config: CompileConfig, schedules: Mapping[int, Schedule], forecaster: Forecaster
) -> PlanFacts:
    """Capture, specialise and count; nothing is lowered and no weight is needed.

    Args:
        model: on the meta device.
        config: the choices.
        schedules: by budget.
        forecaster: fills the cached steps.

    Raises:
        RecacheError: the model cannot be captured or split.
    """
    log.info("capturing")
    captured = capture(model.module, model.example.inputs, {**model.example.roles, **config.roles})
    log.info("finding cache sites")
    sites = tuple(_granularity_facts(captured, config, granularity) for granularity in Granularity)
    annotated = annotate(captured, config)
    programs = specialise(annotated, config)
    log.info("counting")
    macs = count_macs(captured.program, META)
    num_sites = len(cache_points(annotated))
    plans = {budget: make_plan(each, forecaster, num_sites) for budget, each in schedules.items()}
    prologue = programs.get("prologue")
    names = {name for name, _ in model.module.named_parameters()}
    return PlanFacts(
        model=model.name,
        size=model.size,
        config=config,
        forecaster=forecaster.name,
        order=forecaster.order,
        parameters=_count(model.module),
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


def _granularity_facts(captured: Captured, config: CompileConfig, granularity: Granularity) -> GranularityFacts:
    try:
        points = cache_points(annotate(captured, replace(config, granularity=granularity, residual=None)))
    except PassError as error:
        return GranularityFacts(granularity.value, 0, 0, {}, str(error))
    size = sum(tensor_of(point).nbytes for point in points)
    return GranularityFacts(granularity.value, len(points), size, {order: size * (order + 1) for order in ORDERS})


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def print_plan(facts: PlanFacts, console: Console) -> None:
    """Tables for people."""
    hoisted = 1 - facts.step_parameters / max(1, facts.parameters)
    console.print(
        f"{facts.model} {facts.size}, {facts.config.num_steps} steps, {facts.forecaster} order {facts.order},"
        f" {facts.config.granularity} sites\n{with_unit(facts.parameters)} parameters, {hoisted:.1%} of them out of"
        f" the steps; {with_unit(facts.call_macs)} MACs a call",
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
