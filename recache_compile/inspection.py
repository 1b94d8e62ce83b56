"""What a compiled model will do, told before it does it."""

from typing import Any

from rich.console import Console
from rich.table import Table

from recache_compile.compiled import Compiled
from recache_compile.cost import count_macs
from recache_compile.errors import DispatchError
from recache_compile.program import Kind
from recache_compile.serialize import describe


def facts_of(compiled: Compiled) -> dict[str, Any]:
    """Facts about programs, sites, schedules and costs, ready for JSON."""
    variant = compiled.variants[0]
    programs = [
        {
            "name": name,
            "calls": program.num_calls,
            "parameters": program.num_parameters,
            "macs": None if name == "prologue" else count_macs(program),
            "inputs": [value.name for value in program.inputs],
            "outputs": [value.name for value in program.outputs],
        }
        for name, program in variant.programs.items()
    ]
    sites = {
        value.site: {"site": value.site, "shape": list(value.shape), "bytes_per_anchor": value.nbytes}
        for program in variant.programs.values()
        for value in program.outputs
        if value.kind is Kind.FEATURE
    }
    prologue = variant.programs.get("prologue")
    tables = [{"table": value.name, "bytes": value.nbytes} for value in prologue.outputs] if prologue else []
    budgets = []
    for budget, plan in compiled.plans.items():
        cost = compiled.cost(budget)
        budgets.append(
            {
                "budget": budget,
                "recompute_steps": list(plan.schedule.recompute_steps),
                "engines": [step.program for step in plan.steps],
                "macs": cost.macs,
                "macs_reduction": cost.macs_reduction,
                "prologue_macs": cost.prologue_macs,
                "step_macs": list(cost.step_macs),
                "history_bytes": cost.history_bytes,
                "table_bytes": cost.table_bytes,
            }
        )
    total = sum(weight.numel() for weight in compiled.weights.values())
    hoisted = next((facts["parameters"] for facts in programs if facts["name"] == "prologue"), 0)
    return {
        "model": compiled.description.model,
        "model_class": compiled.description.model_class,
        "num_steps": compiled.description.num_steps,
        "forecaster": compiled.description.forecaster,
        "order": compiled.description.order,
        "policy": compiled.description.policy,
        "granularity": compiled.description.granularity,
        "runtime": compiled.description.runtime,
        "parameters": total,
        "hoisted_parameters": hoisted,
        "capture_macs": compiled.capture_macs[0],
        "shapes": [{value.name: list(value.shape) for value in each.inputs} for each in compiled.variants],
        "programs": programs,
        "sites": list(sites.values()),
        "prologue_tables": tables,
        "budgets": budgets,
    }


def print_facts(facts: dict[str, Any], console: Console) -> None:
    """Tables for people."""
    share = facts["hoisted_parameters"] / max(facts["parameters"], 1)
    console.print(
        f"{facts['model']} ({facts['model_class']}), {facts['num_steps']} steps, {facts['forecaster']} order {facts['order']},"
        f" policy {facts['policy']}, {facts['granularity']} sites, {facts['runtime']}\n"
        f"{facts['parameters']:,} parameters, {share:.1%} of them hoisted; {_si(facts['capture_macs'])} MACs a call",
        highlight=False,
        soft_wrap=True,
    )
    programs = Table(title="programs", title_justify="left")
    for column in ("program", "calls", "parameters", "MACs", "reads", "returns"):
        programs.add_column(column, justify="right" if column in ("calls", "parameters", "MACs") else "left")
    for each in facts["programs"]:
        macs = "per row" if each["macs"] is None else _si(each["macs"])
        programs.add_row(
            each["name"],
            f"{each['calls']:,}",
            f"{each['parameters']:,}",
            macs,
            " ".join(each["inputs"]),
            " ".join(each["outputs"]),
        )
    console.print(programs)
    budgets = Table(title="budgets", title_justify="left")
    for column in ("budget", "plan (# recompute, · cached)", "MACs", "MACs ÷", "history", "tables"):
        budgets.add_column(column, justify="left" if column.startswith("plan") else "right")
    for each in facts["budgets"]:
        plan = "".join("#" if engine == "recompute" else "·" for engine in each["engines"])
        budgets.add_row(
            str(each["budget"]),
            plan,
            _si(each["macs"]),
            f"{each['macs_reduction']:.2f}",
            _bytes(each["history_bytes"]),
            _bytes(each["table_bytes"]),
        )
    console.print(budgets)
    for site in facts["sites"]:
        console.print(
            f"site {site['site']}: {site['shape']}, {_bytes(site['bytes_per_anchor'])} per anchor", highlight=False
        )


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
            value = node.meta["value"]
            line = f"{node.name}: {list(value.shape)} {value.kind.value} {value.name}"
        elif node.op == "output":
            line = f"return {', '.join(map(str, node.args[0]))}"
        elif node.op == "get_attr":
            line = f"{node.name}: {_type(node)} = weight {node.target}"
        else:
            arguments = ", ".join([*map(str, node.args), *(f"{key}={value}" for key, value in node.kwargs.items())])
            line = f"{node.name}: {_type(node)} = {getattr(node.target, '__name__', node.target)}({arguments})"
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _type(node: Any) -> str:
    return str(node.meta["type"]) if "type" in node.meta else describe(node.meta.get("val"))


def _si(number: float) -> str:
    for unit in ("", " k", " M", " G", " T"):
        if number < 1000:
            return f"{number:.3g}{unit}"
        number /= 1000
    return f"{number:.3g} P"


def _bytes(number: float) -> str:
    return _si(number) + "B" if number >= 1000 else f"{number:.0f} B"
