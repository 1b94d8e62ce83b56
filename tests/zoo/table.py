"""Write docs/models.md: what works for every transformer class of the installed `diffusers`.

python -m tests.zoo.table
"""

import importlib
import inspect
import platform
import warnings
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

import click
import diffusers
import torch
from diffusers.models import transformers
from rich.progress import track
from torch import nn

from recache_compile.errors import RecacheError
from tests.zoo.base import Case
from tests.zoo.check import BUDGET, NUM_STEPS, Checked, Checker

MODULES = ("images_a_to_l", "images_n_to_z", "videos_a_to_h", "videos_k_to_z", "audio_and_others")
GRANULARITIES = ("output", "stack", "block", "module")
TOLERANCE = 1e-4
PAGE = Path(__file__).parents[2] / "docs" / "models.md"


@dataclass(frozen=True, slots=True)
class Line:
    """One class: what each granularity gave, and the message where it gave nothing."""

    name: str
    checked: dict[str, Checked]
    stopped: dict[str, str]


def all_cases() -> dict[str, Case]:
    """The cases by class."""
    modules = [importlib.import_module(f"tests.zoo.{name}") for name in MODULES]
    return {case.name: case for module in modules for case in module.CASES}


def transformer_classes() -> list[str]:
    """Every model class that `diffusers` exports from `diffusers.models.transformers`."""
    return [
        name
        for name, value in sorted(vars(transformers).items())
        if name in dir(diffusers) and inspect.isclass(value) and issubclass(value, nn.Module)
    ]


def examine(name: str) -> Line:
    """Check one class at every granularity."""
    warnings.simplefilter("ignore")
    torch.set_grad_enabled(False)
    torch.set_num_threads(1)
    case = all_cases().get(name)
    if case is None:
        return Line(name, {}, {"stack": "no small configuration of it is known here"})
    checker, checked, stopped = Checker(case), {}, {}
    for granularity in GRANULARITIES:
        try:
            checked[granularity] = checker.check(granularity)
        except RecacheError as error:
            stopped[granularity] = str(error)
    return Line(name, checked, stopped)


def is_right(checked: Checked | None) -> bool:
    """Whether both budgets gave what they should."""
    return checked is not None and max(checked.full_error, checked.cached_error or 0.0) <= TOLERANCE


def render(lines: list[Line]) -> str:
    """The page."""
    counts = {each: sum(is_right(line.checked.get(each)) for line in lines) for each in GRANULARITIES}
    head = f"""# Models

Made by `python -m tests.zoo.table` with diffusers {diffusers.__version__}, torch {torch.__version__}, on the CPU
({platform.machine()}).  Every transformer class that this diffusers has is built in a small configuration with random
weights, compiled with the eager runtime for T = {NUM_STEPS} and budgets {BUDGET} and {NUM_STEPS}, and run:

- *full*: largest error of any step at budget = T against the original module, relative to its largest value;
- *cached*: the same at budget {BUDGET} against a reference that shares no code with the product: forward hooks on the
  original module, in double precision, with the papers' recursions (`tests/reference.py`).  At `stack` and `block`.
- *hoisted*: share of the parameters that is read by the prologue alone;
- *baked*: inputs whose values the model's Python code reads; they are taken as constants, and a call with other values
  is refused.

Right within {TOLERANCE:.0e}, of {len(lines)} classes: {", ".join(f"`{name}` {count}" for name, count in counts.items())}.

| class | sites: stack | block | module | full | cached: stack | block | hoisted | baked |
|---|---:|---:|---:|---:|---:|---:|---:|---|
"""
    rows = "".join(f"| {' | '.join(_cells(line))} |\n" for line in lines if line.checked)
    reasons = "".join(
        f"- {line.name}, {', '.join(f'`{each}`' for each in group)}: {reason}\n"
        for line in lines
        for reason, group in _by_reason(line).items()
    )
    return head + rows + ("\n## What stops the others\n\n" + reasons if reasons else "")


def _cells(line: Line) -> list[str]:
    sites = [str(line.checked[each].sites) if each in line.checked else "–" for each in ("stack", "block", "module")]
    errors = [_error(line.checked.get(each)) for each in ("stack", "block")]
    some = next(iter(line.checked.values()))
    full = f"{max(each.full_error for each in line.checked.values()):.0e}"
    return [line.name, *sites, full, *errors, f"{some.hoisted:.0%}", ", ".join(f"`{name}`" for name in some.baked)]


def _error(checked: Checked | None) -> str:
    return "–" if checked is None or checked.cached_error is None else f"{checked.cached_error:.0e}"


def _by_reason(line: Line) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for granularity, reason in line.stopped.items():
        groups.setdefault(" ".join(reason.split()), []).append(granularity)
    for granularity, checked in line.checked.items():
        if not is_right(checked):
            groups.setdefault(f"wrong: {asdict(checked)}", []).append(granularity)
    return groups


@click.command()
@click.option("--jobs", default=2, show_default=True, help="Processes.")
def main(jobs: int) -> None:
    """Write docs/models.md."""
    names = transformer_classes()
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        lines = list(track(pool.map(examine, names), total=len(names)))
    PAGE.write_text(render(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
