"""Write docs/pipelines.md: what works for every transformer pipeline of the installed `diffusers`.

python -m tests.zoo.pipelines_table            all of them, into the page
python -m tests.zoo.pipelines_table NAME ...   those alone, one line each
"""

import importlib
import platform
import warnings
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import click
import diffusers
import torch
from rich.console import Console
from rich.progress import track

from recache_compile.errors import RecacheError
from tests.zoo.check_pipeline import CheckedPipeline, check_pipeline
from tests.zoo.pipelines import BUDGET, EXACT, NUM_STEPS, ROUNDED, PipelineCase, pipeline_classes

MODULES = (
    "pipelines_flux",
    "pipelines_sd3_to_sana",
    "pipelines_images",
    "pipelines_videos_a_to_e",
    "pipelines_videos_l_to_z",
    "pipelines_audio_and_others",
)
PAGE = Path(__file__).parents[2] / "docs" / "pipelines.md"


@dataclass(frozen=True, slots=True)
class Line:
    """One class: what it gave, or the message where it gave nothing."""

    name: str
    checked: CheckedPipeline | None
    refused: str = ""

    def __str__(self) -> str:
        """For the terminal."""
        return f"{self.name}: {self.refused or self.checked}"


def all_pipelines() -> dict[str, PipelineCase]:
    """The cases by class."""
    modules = [importlib.import_module(f"tests.zoo.{name}") for name in MODULES]
    return {case.title: case for module in modules for case in module.CASES}


def examine(name: str) -> Line:
    """Check one class."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    case = all_pipelines().get(name)
    if case is None:
        return Line(name, None, "no small configuration of it is known here")
    try:
        return Line(name, check_pipeline(case))
    except RecacheError as error:
        return Line(name, None, " ".join(str(error).split()))


def render(lines: list[Line]) -> str:
    """The page."""
    right = [line for line in lines if line.checked is not None and line.checked.is_right]
    rows = "".join(f"| {' | '.join(_cells(line.name, line.checked))} |\n" for line in lines if line.checked is not None)
    refused = "".join(f"- {line.name}: {line.refused}\n" for line in lines if line.checked is None)
    return f"""# Pipelines

Made by `python -m tests.zoo.pipelines_table` with diffusers {diffusers.__version__}, torch {torch.__version__}, on the
CPU ({platform.machine()}).  Every pipeline that this diffusers has and whose denoiser is a transformer is built small,
with random weights, compiled with the eager runtime for T = {NUM_STEPS} and budgets {BUDGET} and {NUM_STEPS}, and run:

- *full*: largest error of the latents at budget = T against the pipeline on its own transformer, of two prompts in
  turn, relative to the largest value;
- *cached*: how far budget {BUDGET} is from that; with random weights it says only that steps are cached;
- *again*: the same for two generations at budget {BUDGET} with another prompt between them: nothing leaks;
- *recomputed*: calls of the transformers that were recomputed at budget {BUDGET}, and those that its schedule makes of
  the plain pipeline's calls; branches of guidance count each.

Right (full within {EXACT:.0e}, or {ROUNDED:.0e} where the model itself rounds to bfloat16, the same again, as many as
expected): {len(right)} of {len(lines)} cases, at least one of {len({line.name.partition(",")[0] for line in right})} of {len(pipeline_classes())} classes.

| pipeline | full | cached | again | recomputed |
|---|---:|---:|---:|---:|
{rows}
## What is refused, and how

Before anything is lowered, but for those whose message is of values that were compiled: they run, for these values.

{refused}"""


def _cells(name: str, checked: CheckedPipeline) -> list[str]:
    wrong = "" if checked.is_right else " **wrong**"
    numbers = [f"{each:.0e}" for each in (checked.full_error, checked.cached, checked.repeated)]
    return [name + wrong, *numbers, f"{checked.recomputed} of {checked.expected}"]


@click.command()
@click.argument("names", nargs=-1)
@click.option("--jobs", default=2, show_default=True, help="Processes.")
def main(names: tuple[str, ...], jobs: int) -> None:
    """Write docs/pipelines.md, or look at some classes."""
    chosen = list(names) or sorted(all_pipelines())
    console = Console(soft_wrap=True)
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        pending = {name: pool.submit(examine, name) for name in chosen}
        lines = []
        for name, future in track(pending.items(), console=Console(stderr=True)):
            error = future.exception()
            lines.append(
                future.result() if error is None else Line(name, None, f"fails: {type(error).__name__}: {error}")
            )
            console.print(str(lines[-1]), markup=False)
    if not names:
        PAGE.write_text(render(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
