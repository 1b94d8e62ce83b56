"""`recache-compile schedules`: policies side by side."""

import json
from pathlib import Path

import click

from recache_compile.cli.console import PAGE, say, showing_stages
from recache_compile.cli.parameters import BUDGETS


@click.command("schedules")
@click.argument("policies", metavar="POLICY...", nargs=-1, required=True)
@BUDGETS
@click.option("--steps", default=50, show_default=True, help="Denoising steps T.")
@click.option("--forecaster", default="taylor", show_default=True, help="As for compile.")
@click.option("--order", default=1, show_default=True, help="The forecaster's order.")
@click.option("--model", help="Show the surrogate errors on this model too; gram, dp and others need it.")
@click.option("--output", type=click.Path(path_type=Path, dir_okay=False), default="schedules.png", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
def schedules_command(
    policies: tuple[str, ...],
    budgets: tuple[int | float, ...],
    steps: int,
    forecaster: str,
    order: int,
    model: str | None,
    output: Path,
    as_json: bool,
) -> None:
    """Show the schedules of each POLICY side by side.

    POLICY is a name such as uniform:warmup=3, a trained policy's folder, a file, steps or a mask.
    """
    with showing_stages():
        from recache_compile.pipelines.load import load_pipeline
        from recache_compile.pipelines.prompts import captions_for
        from recache_compile.search.charts import draw_schedules
        from recache_compile.search.compare import (
            calibration_of,
            compare_policies,
            facts_of,
            make_question,
            print_compared,
        )
        from recache_compile.support.files import check_file

        question = make_question(policies, budgets, steps, forecaster, order)
        check_file(output)
        calibration = None
        if model is not None:
            pipeline = load_pipeline(model)
            calibration = calibration_of(pipeline, captions_for(pipeline), steps)
        compared = compare_policies(question, calibration)
        draw_schedules(compared.policies, output)
    if as_json:
        click.echo(json.dumps({**facts_of(compared), "model": model, "picture": str(output)}))
        return
    print_compared(compared, PAGE)
    say(f"picture   {output}")
