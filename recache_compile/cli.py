"""The command line: `recache-compile MODEL --budgets 5,10,15` and its sisters."""

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from recache_compile._version import __version__
from recache_compile.errors import ArtifactError, ModelError, RecacheError, ScheduleError

if TYPE_CHECKING:
    from recache_compile.compiled import Compiled
    from recache_compile.measure import Measured

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


class _DefaultCommand(click.Group):
    """A group whose first word may be left out: then it is `compile`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        own = {"--help", "-h", "--version"}
        if args and args[0] not in self.commands and args[0] not in own:
            args = ["compile", *args]
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except RecacheError as error:
            raise click.ClickException(" ".join(str(error).split())) from error
        except click.UsageError as error:
            raise click.ClickException(f"{error.format_message()} (see {ctx.command_path} COMMAND --help)") from error


class _Budgets(click.ParamType):  # type: ignore[type-arg]
    """Whole numbers, separated by commas."""

    name = "K,K,..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        try:
            return tuple(int(part) for part in str(value).split(","))
        except ValueError:
            raise ScheduleError(f"budgets {value!r}: expected whole numbers such as 5,10,15") from None


@click.group(cls=_DefaultCommand, context_settings={"help_option_names": ["--help", "-h"]})
@click.version_option(__version__, prog_name="recache-compile")
def main() -> None:
    """Compile diffusion transformers to cached engines of a fixed, known cost.

    `recache-compile MODEL --budgets 5,10,15` is short for `recache-compile compile MODEL ...`.
    """


@main.command("compile")
@click.argument("model")
@click.option(
    "--budgets",
    type=_Budgets(),
    default="5,10,15",
    show_default=True,
    help="Recompute steps k, one engine set for all.",
)
@click.option("--steps", default=50, show_default=True, help="Denoising steps T.")
@click.option("--forecaster", default="taylor", show_default=True, help="reuse, taylor, hicache or newton.")
@click.option("--order", default=1, show_default=True, help="The forecaster's order.")
@click.option(
    "--policy",
    default="uniform",
    show_default=True,
    help="uniform, uniform:warmup=3, front-loaded, front-loaded:power=2, a schedule file, steps or a mask.",
)
@click.option("--granularity", default="stack", show_default=True, help="Where features are cached: stack or output.")
@click.option("--runtime", default="auto", show_default=True, help="auto, inductor or eager.")
@click.option("--output", type=click.Path(path_type=Path), help="Artifact folder.  [default: MODEL-recache]")
@click.option("--prompt", "prompts", multiple=True, help="Caption of the pictures that are compared; repeat for more.")
@click.option("--seed", type=SEED, default=0, show_default=True, help="Seed of the first picture.")
@click.option(
    "--hoist/--no-hoist", default=True, show_default=True, help="Move latents-independent work out of the steps."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
def compile_command(
    model: str,
    budgets: tuple[int, ...],
    steps: int,
    forecaster: str,
    order: int,
    policy: str,
    granularity: str,
    runtime: str,
    output: Path | None,
    prompts: tuple[str, ...],
    seed: int,
    hoist: bool,
    as_json: bool,
) -> None:
    """Compile MODEL (`shapes`, a diffusers folder or a Hub id) and show what each budget gives."""
    folder = output or Path(f"{Path(model).resolve().name}-recache")
    with _progress() as report:
        report("loading libraries")
        from recache_compile.api import compile, compile_options
        from recache_compile.artifact import check_writable
        from recache_compile.files import check_file
        from recache_compile.loading import EMBEDDED, load_pipeline
        from recache_compile.measure import compare
        from recache_compile.picture import save_comparison
        from recache_compile.recording import record_examples
        from recache_compile.runtimes.registry import get_runtime

        compile_options(budgets, steps, forecaster, order, policy, granularity, hoist)
        backend = get_runtime(runtime, explain=_notice)
        check_writable(folder)
        picture = folder.with_name(f"{folder.name}.png")
        check_file(picture)
        if picture.exists() and not folder.exists():
            raise ArtifactError(f"output {folder}: its picture would replace {picture}; name another folder")
        report(f"loading {model}")
        pipeline = load_pipeline(model)
        captions = prompts or PROMPTS.get(type(pipeline).__name__, ("a photo of a cat in a garden",))
        report("checking the prompts")
        for caption in captions[1:]:  # compiling records the first
            record_examples(pipeline, steps, {"prompt": caption})
        compiled = compile(
            pipeline, None, budgets, steps, forecaster, order, policy, granularity, backend.name,
            hoist=hoist, call={"prompt": captions[0]}, report=report,
        )  # fmt: skip
        where = str(Path(model).resolve()) if model not in EMBEDDED and Path(model).is_dir() else model
        compiled = replace(compiled, description=replace(compiled.description, model=where))
        report(f"writing {folder}")
        compiled.save(folder)
        measured, pictures = compare(pipeline, compiled, captions, seed, report=report)
        if pictures:
            save_comparison(pictures, compiled.schedules, captions, picture)
    if as_json:
        facts = compiled.description
        result = {
            "model": model,
            "artifact": str(folder),
            "picture": str(picture) if pictures else None,
            "num_steps": steps,
            "forecaster": facts.forecaster,
            "order": facts.order,
            "policy": facts.policy,
            "runtime": facts.runtime,
            "budgets": [asdict(each) for each in measured],
        }
        click.echo(json.dumps(result))
        return
    _print_measured(compiled, measured)
    _say(f"artifact  {folder}\n" + (f"picture   {picture}" if pictures else "no picture: the pipeline makes no images"))


def _print_measured(compiled: "Compiled", measured: "list[Measured]") -> None:
    """The table that ends a compilation."""
    facts = compiled.description
    title = f"{facts.model}: {facts.num_steps} steps, {facts.forecaster} order {facts.order}, {facts.policy}, {facts.runtime}"
    table = Table(title=escape(title))
    for column in ("budget", "recompute steps", "MACs", "speed", "PSNR", "SSIM"):
        table.add_column(column, justify="left" if column == "recompute steps" else "right")
    for each in measured:
        table.add_row(
            str(each.budget),
            " ".join(map(str, each.recompute_steps)),
            f"÷ {each.macs_reduction:.2f}",
            f"× {each.speedup:.2f}",
            "-" if each.psnr is None else f"{each.psnr:.1f} dB",
            "-" if each.ssim is None else f"{each.ssim:.3f}",
        )
    PAGE.print(table)


@main.command("run")
@click.argument("artifact", type=click.Path(path_type=Path))
@click.argument("caption")
@click.option("--budget", type=int, help="Recompute steps k.  [default: the smallest in the artifact]")
@click.option("--seed", type=SEED, default=0, show_default=True)
@click.option("--output", type=click.Path(path_type=Path, dir_okay=False), default="picture.png", show_default=True)
@click.option(
    "--scale", type=click.IntRange(1, 64), default=8, show_default=True, help="Enlarge small pictures by this factor."
)
def run_command(artifact: Path, caption: str, budget: int | None, seed: int, output: Path, scale: int) -> None:
    """Draw CAPTION with a compiled ARTIFACT."""
    with _progress() as report:
        report("loading libraries")
        import torch

        from recache_compile.artifact import load
        from recache_compile.files import check_file, writing
        from recache_compile.loading import load_pipeline
        from recache_compile.stand_in import accelerate

        check_file(output)
        report(f"loading {artifact}")
        compiled = load(artifact)
        pipeline = load_pipeline(compiled.description.model, transformer=None)
        accelerate(pipeline, compiled, budget)
        pipeline.set_progress_bar_config(disable=True)
        report("drawing")
        generator = torch.Generator().manual_seed(seed)
        steps = compiled.description.num_steps
        images = getattr(pipeline(caption, num_inference_steps=steps, generator=generator), "images", None)
        if images is None:
            raise ModelError(f"{compiled.description.model}: the pipeline makes no images; use it from Python instead")
        picture = images[0]
        if max(picture.size) <= 128:
            picture = picture.resize((picture.width * scale, picture.height * scale), resample=0)
        with writing(output) as partial:
            picture.save(partial, format="PNG")
    _say(f"{output}  ({pipeline.transformer.budget} of {steps} steps recomputed)")


@main.command("inspect")
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--graph", help="Print one program: its name.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
def inspect_command(artifact: Path, graph: str | None, as_json: bool) -> None:
    """Show the plan of a compiled ARTIFACT: steps, engines, sites, costs."""
    with _progress() as report:
        report("loading libraries")
        from recache_compile.artifact import load
        from recache_compile.inspection import facts_of, print_facts, print_graph

        report(f"loading {artifact}")
        compiled = load(artifact)
        facts = None if graph else facts_of(compiled)
    if graph:
        print_graph(compiled, graph, PAGE)
    elif as_json:
        assert facts is not None
        click.echo(json.dumps(asdict(facts), default=str))
    else:
        assert facts is not None
        print_facts(facts, PAGE)


def _say(text: str) -> None:
    """Print on stdout as it is."""
    PAGE.print(text, highlight=False, markup=False, soft_wrap=True)


def _notice(text: str) -> None:
    """Print a line on stderr that stays."""
    LOG.print(text, highlight=False, markup=False, soft_wrap=True)


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """A spinner with the current stage; one line a stage where there is no terminal."""
    if not LOG.is_terminal:
        yield _notice
        return
    with LOG.status("starting") as status:
        yield lambda stage: status.update(escape(stage))


if __name__ == "__main__":
    sys.exit(main())
