"""`recache-compile cache`: what the package keeps on the user's disk, and `recache-compile cache clear`."""

import json
from dataclasses import asdict

import click

from recache_compile.cli.console import say
from recache_compile.support.disk_cache import cache_limit, clear_cache, parts_of_cache
from recache_compile.support.files import cache_folder


@click.group("cache", invoke_without_command=True)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
@click.pass_context
def cache_command(ctx: click.Context, as_json: bool) -> None:
    """Show what is kept on disk so that it need not be made again; `cache clear` removes it."""
    if ctx.invoked_subcommand is not None:
        return
    limit, parts = cache_limit(), parts_of_cache()
    if as_json:
        click.echo(json.dumps({"folder": str(cache_folder()), "limit": limit, "parts": [*map(asdict, parts)]}))
        return
    say(f"{cache_folder()}  (lowered programs: at most {limit / 1e9:g} GB)")
    for part in parts:
        say(f"  {part.name:<10} {part.entries:>6} entries  {part.size / 1e6:>9.1f} MB")
    if not parts:
        say("  empty")


@cache_command.command("clear")
def clear_command() -> None:
    """Remove all of it."""
    size = sum(part.size for part in parts_of_cache())
    clear_cache()
    say(f"removed {size / 1e6:.1f} MB from {cache_folder()}")
