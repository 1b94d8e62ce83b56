"""`recache-compile plan`: what compiling would cost and save."""

import json
from dataclasses import asdict
from typing import Any

import click

from recache_compile.cli.console import PAGE, showing_stages
from recache_compile.cli.parameters import BUDGETS, JsonObject


@click.command("plan")
@click.argument("model")
@BUDGETS
@click.option(
    "--steps", type=click.IntRange(1), help="Denoising steps T.  [default: the usual number of a known model, else 50]"
)
@click.option("--forecaster", default="taylor", show_default=True, help="reuse, taylor, hicache, newton or fitted.")
@click.option("--order", default=1, show_default=True, help="The forecaster's order.")
@click.option(
    "--policy", default="auto", show_default=True, help="As for compile; auto is uniform, costs are the same."
)
@click.option("--granularity", default="stack", show_default=True, help="output, stack, block or module.")
@click.option("--residual/--absolute", default=None, help="As for compile.")
@click.option("--hoist/--no-hoist", default=True, show_default=True, help="As for compile.")
@click.option("--call", type=JsonObject(), default="{}", help="Further arguments of the pipeline.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
def plan_command(
    model: str,
    budgets: tuple[int | float, ...],
    steps: int | None,
    forecaster: str,
    order: int,
    policy: str,
    granularity: str,
    residual: bool | None,
    hoist: bool,
    call: dict[str, Any],
    as_json: bool,
) -> None:
    """Show what compiling MODEL would cost and save, without its weights.

    MODEL is the name of a known model (such as flux.1-dev), a JSON file that describes one,
    or whatever compile takes.
    """
    with showing_stages():
        from recache_compile.api import plan
        from recache_compile.artifact.weightless import print_plan

        facts = plan(
            model, budgets=budgets, num_steps=steps, forecaster=forecaster, order=order, policy=policy,
            granularity=granularity, residual=residual, hoist=hoist, call=call,
        )  # fmt: skip
    if as_json:
        click.echo(json.dumps(asdict(facts)))
    else:
        print_plan(facts, PAGE)
