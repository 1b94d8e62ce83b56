"""What the commands have in common: where they print, and how they say what they are doing."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import click
from rich.console import Console
from rich.markup import escape

DTYPES = ("float32", "bfloat16", "float16")
SEED = click.IntRange(0, 2**63 - 1_000_000)
LOG = Console(stderr=True)
PAGE = Console()

PROMPTS = {
    "ShapesPipeline": (
        "a red circle left of a blue square on a dark background",
        "a yellow triangle above a magenta ring on a checkered background",
        "a green cross right of a cyan diamond on a striped background",
        "a blue ring below a yellow square on a light background",
    )
}


def captions_for(pipeline: Any) -> tuple[str, ...]:
    """Captions for a pipeline where the user gives none."""
    return PROMPTS.get(type(pipeline).__name__, ("a photo of a cat in a garden",))


def say(text: str) -> None:
    """Print on stdout as it is."""
    PAGE.print(text, highlight=False, markup=False, soft_wrap=True)


def notice(text: str) -> None:
    """Print a line on stderr that stays."""
    LOG.print(text, highlight=False, markup=False, soft_wrap=True)


@contextlib.contextmanager
def showing_stages() -> Iterator[Callable[[str], None]]:
    """A spinner with the current stage; one line a stage where there is no terminal."""
    if not LOG.is_terminal:
        yield notice
        return
    with LOG.status("starting") as status:
        yield lambda stage: status.update(escape(stage))
