"""What a compiled model does and costs, known before it runs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from rich.console import Console, JustifyMethod
from rich.table import Table

from recache_compile.compiler.compiled import Compiled, Description
from recache_compile.errors import DispatchError
from recache_compile.ir.cost import Cost, count_macs
from recache_compile.ir.meta import value_of
from recache_compile.ir.plan import Plan
from recache_compile.ir.program import MIN_ROWS, REQUESTS, Program
from recache_compile.ir.serialize import type_of
from recache_compile.ir.value import Kind
from recache_compile.runtimes.base import Variant, requirement_texts


@dataclass(frozen=True, slots=True)
class ProgramFacts:
    """One program.

    Args:
        name: of it.
        calls: in its graph.
        parameters: that it reads.
        macs: of one call, or of one step or request where a call serves several; None for the prologue, whose cost
            depends on the rows.
        inputs, outputs: names; evaluations of earlier releases do not tell them.
    """

    name: str
    calls: int
    parameters: int
    macs: int | None
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class SiteFacts:
    """One cache site: the shape of its feature, and what an anchor of it takes."""

    site: int
    shape: tuple[int | None, ...]
    bytes_per_anchor: int


@dataclass(frozen=True, slots=True)
class BudgetFacts:
    """One plan: which engine each step runs, and what a generation costs."""

    budget: int
    recompute_steps: tuple[int, ...]
    engines: tuple[str, ...]
    macs: int
    macs_reduction: float
    prologue_macs: int
    step_macs: tuple[int, ...]
    history_bytes: int
    table_bytes: int


@dataclass(frozen=True, slots=True)
class ArtifactFacts:
    """All that `inspect` shows; shapes, programs and sites are those of the first kind of calls.

    `calls` tells the shapes of all kinds; a size that is free is a range, which is that of the examples.
    """

    description: Description
    requirements: Mapping[str, str]
    forecaster: str
    order: int
    policy: str
    parameters: int
    hoisted_parameters: int
    capture_macs: int
    shapes: dict[str, tuple[int | None, ...]]
    calls: tuple[dict[str, str], ...]
    programs: tuple[ProgramFacts, ...]
    sites: tuple[SiteFacts, ...]
    budgets: tuple[BudgetFacts, ...]


def facts_of(compiled: Compiled) -> ArtifactFacts:
    """Facts about programs, sites, schedules and costs."""
    variant = compiled.variants[0]
    prologue = variant.programs.get("prologue")
    return ArtifactFacts(
        description=compiled.description,
        requirements=compiled.engines.requirements,
        forecaster=compiled.forecaster.name,
        order=compiled.forecaster.order,
        policy=compiled.policy,
        parameters=sum(weight.numel() for weight in compiled.weights.values()),
        hoisted_parameters=prologue.num_parameters if prologue else 0,
        capture_macs=variant.macs,
        shapes={value.name: value.shape for value in variant.inputs},
        calls=tuple(map(call_facts, compiled.variants)),
        programs=tuple(program_facts(program, variant.device) for program in variant.programs.values()),
        sites=tuple(
            SiteFacts(value.site or 0, value.shape, value.nbytes)
            for value in variant.programs["recompute"].outputs
            if value.kind is Kind.FEATURE
        ),
        budgets=tuple(budget_facts(budget, plan, compiled.cost(budget)) for budget, plan in compiled.plans.items()),
    )


def call_facts(variant: Variant) -> dict[str, str]:
    """The shapes of one kind of call, by input, free sizes as ranges."""
    ranges = variant.programs["recompute"].ranges
    return {value.name: value.shape_text(ranges) for value in variant.inputs}


def program_facts(program: Program, device: torch.device) -> ProgramFacts:
    """Facts about one program whose weights are on `device`."""
    rows = MIN_ROWS if program.serves_gaps or program.name == REQUESTS else 1  # as many as are counted
    return ProgramFacts(
        name=program.name,
        calls=program.num_calls,
        parameters=program.num_parameters,
        macs=None if program.name == "prologue" else count_macs(program, device) // rows,
        inputs=tuple(value.name for value in program.inputs),
        outputs=tuple(value.name for value in program.outputs),
    )


def budget_facts(budget: int, plan: Plan, cost: Cost) -> BudgetFacts:
    """Facts about one plan."""
    return BudgetFacts(
        budget=budget,
        recompute_steps=plan.schedule.recompute_steps,
        engines=tuple(step.program for step in plan.steps),
        macs=cost.macs,
        macs_reduction=cost.macs_reduction,
        prologue_macs=cost.prologue_macs,
        step_macs=cost.step_macs,
        history_bytes=cost.history_bytes,
        table_bytes=cost.table_bytes,
    )


def print_facts(facts: ArtifactFacts, console: Console) -> None:
    """Tables for people."""
    about, config = facts.description, facts.description.config
    console.print(
        f"{about.model} ({about.model_class}), {config.num_steps} steps, {facts.forecaster} order {facts.order},"
        f" policy {facts.policy}, {config.granularity} sites, {config.dtype}, {config.runtime}"
        f"{' with CUDA graphs' if config.cuda_graphs else ''} for"
        f" {', '.join(requirement_texts(facts.requirements)) or 'any machine'}\n"
        f"{facts.parameters:,} parameters, {facts.hoisted_parameters / max(facts.parameters, 1):.1%} of them hoisted;"
        f" {with_unit(facts.capture_macs)} MACs a call",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    print_programs(facts.programs, console)
    print_budgets(facts.budgets, console)
    console.print("plans: # recompute, · cached", highlight=False)
    for budget in facts.budgets:
        plan = "".join("#" if engine == "recompute" else "·" for engine in budget.engines)
        console.print(f"{budget.budget:>6}  {plan}", highlight=False, markup=False, soft_wrap=True)
    for each in facts.calls:
        inputs = ", ".join(f"{name} {shape}" for name, shape in each.items())
        console.print(f"calls with {inputs}", highlight=False, markup=False, soft_wrap=True)
    for site in facts.sites:
        shape = list(site.shape)
        console.print(
            f"site {site.site}: {shape}, {_bytes(site.bytes_per_anchor)} per anchor", highlight=False, markup=False
        )


def print_programs(programs: Sequence[ProgramFacts], console: Console) -> None:
    """One row a program."""
    rows = table("programs", ">calls", ">parameters", ">MACs", "reads", "returns", first="program")
    for each in programs:
        macs = "per row" if each.macs is None else with_unit(each.macs)
        names = (_names(each.inputs), _names(each.outputs))
        rows.add_row(each.name, f"{each.calls:,}", f"{each.parameters:,}", macs, *names)
    console.print(rows)


def _names(names: Sequence[str]) -> str:
    """Up to twelve names as they are, more of them shortened: there can be hundreds of features."""
    return " ".join(names) if len(names) <= 12 else f"{' '.join(names[:6])} ... {names[-1]} ({len(names)})"


def print_budgets(budgets: Sequence[BudgetFacts], console: Console) -> None:
    """One row a budget."""
    rows = table("budgets", ">MACs", ">of them prologue", ">MACs ÷", ">history", ">tables", first=">budget")
    for budget in budgets:
        costs = (with_unit(budget.macs), with_unit(budget.prologue_macs), f"{budget.macs_reduction:.2f}")
        rows.add_row(str(budget.budget), *costs, _bytes(budget.history_bytes), _bytes(budget.table_bytes))
    console.print(rows)


def table(title: str, *columns: str, first: str) -> Table:
    """A table; columns that begin with > are right-aligned."""
    table = Table(title=title, title_justify="left")
    for column in (first, *columns):
        side: JustifyMethod = "right" if column.startswith(">") else "left"
        table.add_column(column.removeprefix(">"), justify=side, overflow="fold")
    return table


def print_graph(compiled: Compiled, name: str, console: Console) -> None:
    """One line for each node of a program.

    Raises:
        DispatchError: there is no such program.
    """
    programs = compiled.variants[0].programs
    if name not in programs:
        raise DispatchError(f"program {name!r} is not in the artifact; there are {', '.join(programs)}")
    program = programs[name]
    for node in program.module.graph.nodes:
        if node.op == "placeholder":
            value = value_of(node)
            line = f"{node.name}: {list(value.shape)} {value.kind.value} {value.name}"
        elif node.op == "output":
            line = f"return {', '.join(map(str, node.args[0]))}"
        elif node.op == "get_attr":
            line = f"{node.name}: {type_of(node)} = weight {node.target}"
        else:
            arguments = ", ".join([*map(str, node.args), *(f"{key}={value}" for key, value in node.kwargs.items())])
            line = f"{node.name}: {type_of(node)} = {getattr(node.target, '__name__', node.target)}({arguments})"
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def with_unit(number: float) -> str:
    """Three digits and an SI prefix."""
    for unit in ("", " k", " M", " G", " T"):
        if number < 1000:
            return f"{number:.3g}{unit}"
        number /= 1000
    return f"{number:.3g} P"


def _bytes(number: float) -> str:
    return with_unit(number) + "B" if number >= 1000 else f"{number:.0f} B"
