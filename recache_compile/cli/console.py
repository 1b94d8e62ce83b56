"""What the commands have in common: where they print, and how they say what they are doing."""

import contextlib
from collections.abc import Iterator

import click
from rich.console import Console
from rich.markup import escape

from recache_compile.support.log import told

DTYPES = ("float32", "bfloat16", "float16")
SEED = click.IntRange(0, 2**63 - 1_000_000)
LOG = Console(stderr=True)
PAGE = Console()


def say(text: str) -> None:
    """Print on stdout as it is."""
    PAGE.print(text, highlight=False, markup=False, soft_wrap=True)


def notice(text: str) -> None:
    """Print a line on stderr that stays."""
    LOG.print(text, highlight=False, markup=False, soft_wrap=True)


@contextlib.contextmanager
def showing_stages() -> Iterator[None]:
    """Show what the package says it is doing: a spinner, or one line a stage where there is no terminal."""
    if not LOG.is_terminal:
        with told(notice):
            yield
        return
    with LOG.status("loading libraries") as status, told(lambda stage: status.update(escape(stage))):
        yield
