"""Write docs/plans.md: what compiling well-known models would give, planned from their configurations alone.

python benchmarks/plans.py
"""

import platform
import resource
import time
from pathlib import Path

import click
import torch

import recache_compile as rc
from recache_compile.artifact.inspect import with_unit
from recache_compile.artifact.specs import known_specs
from recache_compile.artifact.weightless import ORDERS, PlanFacts
from recache_compile.pipelines.weightless import find_weightless

PAGE = Path(__file__).parents[1] / "docs" / "plans.md"
BUDGETS = (5, 10, 15)


def plan(name: str) -> tuple[PlanFacts, float]:
    """Plan a known model with the defaults; also the seconds that it took."""
    begin = time.perf_counter()
    num_steps = find_weightless(name, 50, {}).num_steps
    facts = rc.plan(name, budgets=[budget for budget in BUDGETS if budget <= num_steps])
    return facts, time.perf_counter() - begin


def render(planned: list[tuple[PlanFacts, float]]) -> str:
    """The page."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    slowest = max(seconds for _, seconds in planned)
    text = f"""# Plans of well-known models

Made by `python benchmarks/plans.py` from configurations alone: no weights, no GPU, on {torch.get_num_threads()} threads
of a CPU ({platform.machine()}), torch {torch.__version__}.  The slowest took {slowest:.0f} s, and the process {peak:.1f} GB
at its peak.  One call is one guidance branch, or both where the pipeline batches them.  Each of these is also a name for
`recache-compile plan`, which takes other budgets, forecasters and granularities.

| model | size | steps | parameters | out of the steps | calls in a recompute step | in a cached step | MACs of one call |
|---|---|---:|---:|---:|---:|---:|---:|
"""
    for facts, _ in planned:
        programs = {each.name: each for each in facts.programs}
        cached = programs["forecast"]
        share = 1 - facts.step_parameters / facts.parameters
        text += (
            f"| {facts.model} | {facts.size} | {facts.config.num_steps} | {with_unit(facts.parameters)} | {share:.1%} |"
            f" {programs['recompute'].calls:,} | {cached.calls} | {with_unit(facts.call_macs)} |\n"
        )
    text += "\n## What a budget costs\n\nMACs of a whole generation, prologue included, and what it holds on the device.\n\n"
    text += "| model | budget | MACs | of them prologue | MACs ÷ | history (taylor 1) | prologue tables |\n"
    text += "|---|---:|---:|---:|---:|---:|---:|\n"
    for facts, _ in planned:
        for each in facts.budgets:
            costs = (each.macs, each.prologue_macs)
            text += (
                f"| {facts.model} | {each.budget} of {facts.config.num_steps} | {' | '.join(map(with_unit, costs))} |"
                f" {each.macs_reduction:.2f} | {with_unit(each.history_bytes)}B | {with_unit(each.table_bytes)}B |\n"
            )
    text += "\n## Cache memory\n\nFeatures held by one guidance branch: order m holds m + 1 anchors.\n\n"
    text += f"| model | granularity | sites | {' | '.join(f'order {m}' for m in ORDERS)} |\n|---|---|---:|{'---:|' * len(ORDERS)}\n"
    for facts, _ in planned:
        for site in facts.sites:
            held = [f"{with_unit(site.history_bytes[m])}B" if site.sites else "–" for m in ORDERS]
            text += f"| {facts.model} | {site.granularity} | {site.sites} | {' | '.join(held)} |\n"
    text += "\n## Boundary of the prologue\n\nOne packed tensor for each dtype; `row` has one row per step that reads it.\n\n"
    text += "| model | tensor | bytes |\n|---|---|---:|\n"
    for facts, _ in planned:
        for name, size in facts.boundary.items():
            text += f"| {facts.model} | `{name}` | {with_unit(size)}B{' a row' if name in facts.row_tables else ''} |\n"
    return text


@click.command()
@click.argument("models", nargs=-1)
def main(models: tuple[str, ...]) -> None:
    """Plan MODELS (all known ones by default) and write docs/plans.md."""
    planned = []
    for name in models or known_specs():
        planned.append(plan(name))
        click.echo(f"{name}: {planned[-1][1]:.0f} s")
    PAGE.write_text(render(planned), encoding="utf-8")


if __name__ == "__main__":
    main()
