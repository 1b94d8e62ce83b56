"""The tables of an evaluation, for people."""

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from recache_compile.evaluation.metrics import METRICS
from recache_compile.evaluation.result import EvaluationResult
from recache_compile.evaluation.statistics import Estimate
from recache_compile.evaluation.wording import UNSURE, percent, plain, target_line


def print_result(result: EvaluationResult, console: Console) -> None:
    """Print the tables of quality and of cost, then the policies and budgets that meet the target."""
    console.print(
        f"{result.model}, T = {result.num_steps}, {result.forecaster} order {result.order}, {result.granularity}"
        f" sites, {result.runtime}, {result.samples} samples in batches of {result.batch_size}, {result.dtype} on"
        f" {result.machine}"
        + (f"; fid is the distance to {result.reference}" if result.reference else ""),
        highlight=False, markup=False, soft_wrap=True,
    )  # fmt: skip
    console.print(_quality(result))
    console.print(_cost(result))
    if any(each.target.endswith("?") for each in result.lines):
        console.print(UNSURE, highlight=False, markup=False)
    for policy in dict.fromkeys(each.policy for each in result.lines):
        console.print(target_line(result, policy), highlight=False, markup=False, soft_wrap=True)


def _quality(result: EvaluationResult) -> Table:
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


def _cost(result: EvaluationResult) -> Table:
    """What quality costs, and what is lost."""
    names = [
        name for name, metric in METRICS.items() if metric.counts and any(name in each.losses for each in result.lines)
    ]
    titles = [f"loss in {name}" for name in names]
    table = Table("policy", "k", "MACs", "speed", *titles, "target", title="cost", title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    for each in result.lines:
        losses = [percent(each.losses[name]) if name in each.losses else "-" for name in names]
        table.add_row(
            escape(each.policy),
            str(each.budget),
            f"÷ {each.macs_reduction:.2f}",
            f"× {each.speedup:.2f}",
            *losses,
            each.target,
        )
    return table


def _title(name: str) -> str:
    unit = METRICS[name].unit
    return f"{name} {unit}".strip() + (" ↑" if METRICS[name].higher else " ↓")


def _cell(estimate: Estimate | None) -> str:
    return "" if estimate is None else plain(estimate).replace(" ± ", "\n± ")
