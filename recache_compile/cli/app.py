"""The command line: `recache-compile MODEL --budgets 5,10,15` and the other commands."""

import logging
import signal
import sys
import threading
from typing import Any

import click

from recache_compile._version import __version__
from recache_compile.cli.bench import bench_command
from recache_compile.cli.cache import cache_command
from recache_compile.cli.compile import compile_command
from recache_compile.cli.evaluate import evaluate_command
from recache_compile.cli.inspect import inspect_command
from recache_compile.cli.plan import plan_command
from recache_compile.cli.rebuild import rebuild_command
from recache_compile.cli.report import report_command
from recache_compile.cli.run import run_command
from recache_compile.cli.schedules import schedules_command
from recache_compile.cli.train import train_command
from recache_compile.errors import RecacheError, check_memory

log = logging.getLogger(__name__)


class _DefaultCommand(click.Group):
    """A group whose first word may be left out: then it is `compile`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        own = {"--help", "-h", "--version"}
        if args and args[0] not in self.commands and args[0] not in own:
            args = ["compile", *args]
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.default_int_handler)  # nothing half-written stays, as after Ctrl-C
        try:
            return super().invoke(ctx)
        except RecacheError as error:
            log.debug("this stopped the command", exc_info=True)
            raise click.ClickException(" ".join(str(error).split())) from error
        except (MemoryError, RuntimeError) as error:
            try:
                check_memory(error)
            except RecacheError as short:
                raise click.ClickException(str(short)) from error
            raise
        except click.UsageError as error:
            raise click.ClickException(f"{error.format_message()} (see {ctx.command_path} COMMAND --help)") from error


@click.group(cls=_DefaultCommand, context_settings={"help_option_names": ["--help", "-h"]})
@click.version_option(__version__, prog_name="recache-compile")
def main() -> None:
    """Compile diffusion transformers to cached engines of a fixed, known cost.

    `recache-compile MODEL --budgets 5,10,15` is short for `recache-compile compile MODEL ...`.
    """


COMMANDS = (
    compile_command,
    run_command,
    inspect_command,
    rebuild_command,
    bench_command,
    evaluate_command,
    report_command,
    plan_command,
    train_command,
    schedules_command,
    cache_command,
)
for command in COMMANDS:
    main.add_command(command)


if __name__ == "__main__":
    sys.exit(main())
