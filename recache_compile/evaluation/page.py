"""The tables of an evaluation, for people."""

from math import floor, log10

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from recache_compile.evaluation.metrics import METRICS
from recache_compile.evaluation.result import Result
from recache_compile.evaluation.statistics import TARGET_LOSS, TARGET_REDUCTION, Estimate


def print_result(result: Result, console: Console) -> None:
    """Quality beside cost, then who meets the target."""
    console.print(
        f"{result.model}, T = {result.num_steps}, {result.forecaster} order {result.order}, {result.granularity}"
        f" sites, {result.runtime}, {result.samples} samples in batches of {result.batch_size}, {result.dtype} on"
        f" {result.machine}"
        + (f"; fid is the distance to {result.reference}" if result.reference else ""),
        highlight=False, markup=False, soft_wrap=True,
    )  # fmt: skip
    console.print(_quality(result))
    console.print(_cost(result))
    for policy in dict.fromkeys(each.policy for each in result.lines):
        console.print(target_line(result, policy), highlight=False, markup=False, soft_wrap=True)


def _quality(result: Result) -> Table:
    """Means with their standard errors below."""
    known = {name for values in (result.uncached, *(each.values for each in result.lines)) for name in values}
    names = [name for name in METRICS if name in known]
    table = Table("policy", "k", *(_title(name) for name in names), title="quality", title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    table.add_row("uncached", str(result.num_steps), *(_cell(result.uncached.get(name)) for name in names))
    for each in result.lines:
        table.add_row(escape(each.policy), str(each.budget), *(_cell(each.values.get(name)) for name in names))
    return table


def _cost(result: Result) -> Table:
    """What quality costs, and what is lost."""
    names = [
        name for name, metric in METRICS.items() if metric.counts and any(name in each.losses for each in result.lines)
    ]
    titles = [f"loss in {name}" for name in names]
    table = Table("policy", "k", "MACs", "speed", *titles, "target", title="cost", title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    for each in result.lines:
        speed = "-" if each.speedup is None else f"× {each.speedup:.2f}"
        losses = [percent(each.losses[name]) if name in each.losses else "-" for name in names]
        table.add_row(
            escape(each.policy), str(each.budget), f"÷ {each.macs_reduction:.2f}", speed, *losses, each.target
        )
    return table


def target_line(result: Result, policy: str) -> str:
    """Where a policy meets the target."""
    target = f"{TARGET_REDUCTION:g} times fewer MACs and faster at a loss up to {TARGET_LOSS:.0%}"
    if all(each.target == "unknown" for each in result.lines):
        return f"{policy}: {target}: unknown; it takes a time of the original, and clip, fid or vbench (attributes of shapes)"
    budget = result.smallest(policy)
    return f"{policy}: {target}: " + ("at no budget" if budget is None else f"from k = {budget}")


def percent(loss: Estimate) -> str:
    """A loss with its standard error, as +0.3 ± 0.1 %."""
    error = "" if loss.error is None else f" ± {100 * loss.error:.1f}"
    return f"{100 * loss.value:+.1f}{error} %"


def plain(estimate: Estimate) -> str:
    """A value with its standard error, to the error's second digit."""
    if not estimate.error:
        return f"{estimate.value:.4g}"
    digits = max(0, 1 - floor(log10(estimate.error)))
    return f"{estimate.value:.{digits}f} ± {estimate.error:.{digits}f}"


def _title(name: str) -> str:
    unit = METRICS[name].unit
    return f"{name} {unit}".strip() + (" ↑" if METRICS[name].higher else " ↓")


def _cell(estimate: Estimate | None) -> str:
    return "" if estimate is None else plain(estimate).replace(" ± ", "\n± ")
