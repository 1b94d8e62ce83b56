"""`recache-compile inspect`: what an artifact holds."""

import json
from dataclasses import asdict

import click

from recache_compile.cli.console import PAGE, showing_stages


@click.command("inspect")
@click.argument("artifact", type=click.Path())
@click.option("--graph", help="Print one program: its name.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
def inspect_command(artifact: str, graph: str | None, as_json: bool) -> None:
    """Show the plan of a compiled ARTIFACT: steps, engines, sites, costs."""
    with showing_stages():
        from recache_compile.artifact.inspect import facts_of, print_facts, print_graph
        from recache_compile.artifact.store import look

        compiled = look(artifact)
        facts = None if graph else facts_of(compiled)
    if graph:
        print_graph(compiled, graph, PAGE)
    elif as_json:
        assert facts is not None
        click.echo(json.dumps(asdict(facts), default=str))
    else:
        assert facts is not None
        print_facts(facts, PAGE)
