"""`recache-compile report`: a page to look at."""

from pathlib import Path

import click

from recache_compile.cli.console import say, showing_stages


@click.command("report")
@click.argument("evaluation", type=click.Path(path_type=Path))
@click.option(
    "--output", type=click.Path(path_type=Path, dir_okay=False), help="HTML file.  [default: EVALUATION.html]"
)
@click.option(
    "--bench", type=click.Path(path_type=Path, dir_okay=False), help="JSON of a run of bench, to show beside."
)
def report_command(evaluation: Path, output: Path | None, bench: Path | None) -> None:
    """Make one HTML page, which needs no network, of what evaluate wrote to EVALUATION."""
    with showing_stages():
        from recache_compile.report.build import write_report
        from recache_compile.support.files import check_file

        file = output or Path(f"{evaluation.resolve().name}.html")
        check_file(file)
        write_report(evaluation, file, bench)
    say(f"page      {file}")
