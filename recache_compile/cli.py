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
from recache_compile.errors import ArtifactError, ModelError, RecacheError
from recache_compile.parameters import JsonObject, Numbers, Size, check_call

if TYPE_CHECKING:
    from recache_compile.compiled import Compiled
    from recache_compile.measure import Measured

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
    type=Numbers("budgets"),
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
@click.option(
    "--granularity",
    default="stack",
    show_default=True,
    help="Where features are cached: output, stack, block or module.",
)
@click.option(
    "--residual/--absolute",
    default=None,
    help="Cache what is added to the stream, or the stream itself.  [default: residual at block, else absolute]",
)
@click.option("--runtime", default="auto", show_default=True, help="auto, inductor or eager.")
@click.option("--dtype", type=click.Choice(DTYPES), default="float32", show_default=True, help="Type of the weights.")
@click.option("--size", "sizes", type=Size(), multiple=True, help="Picture size; repeat for several in one artifact.")
@click.option(
    "--batch", type=Numbers("batch", minimum=1), default="1", show_default=True, help="Pictures per call: 1 or 1,4."
)
@click.option(
    "--call", type=JsonObject(), default="{}", help="Further arguments of the pipeline: '{\"guidance_scale\": 3.5}'."
)
@click.option("--component", default="transformer", show_default=True, help="Which transformer of the pipeline.")
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
    residual: bool | None,
    runtime: str,
    dtype: str,
    sizes: tuple[tuple[int, int], ...],
    batch: tuple[int, ...],
    call: dict[str, Any],
    component: str,
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
        import torch

        from recache_compile.api import compile, compile_options
        from recache_compile.artifact import check_writable
        from recache_compile.files import check_file
        from recache_compile.loading import EMBEDDED, load_pipeline
        from recache_compile.measure import compare
        from recache_compile.picture import save_comparison
        from recache_compile.recording import prompted, record_examples
        from recache_compile.runtimes.registry import get_runtime

        compile_options(budgets, steps, forecaster, order, policy, granularity, hoist, residual)
        backend = get_runtime(runtime, explain=_notice)
        check_writable(folder)
        picture = folder.with_name(f"{folder.name}.png")
        check_file(picture)
        if picture.exists() and not folder.exists():
            raise ArtifactError(f"output {folder}: its picture would replace {picture}; name another folder")
        report(f"loading {model}")
        pipeline = load_pipeline(model, getattr(torch, dtype))
        captions = prompts or PROMPTS.get(type(pipeline).__name__, ("a photo of a cat in a garden",))
        check_call(call, batch)
        shapes = [{"width": width, "height": height, **call} for width, height in sizes] or [call]
        report("checking the prompts")
        for caption in captions[1:]:  # compiling records the first
            record_examples(pipeline, steps, prompted(pipeline, caption, shapes[0]), component)
        compiled = compile(
            pipeline, None, budgets, steps, forecaster, order, policy, granularity, backend.name,
            residual=residual, hoist=hoist, component=component, report=report,
            call=[prompted(pipeline, captions[0], each, number) for each in shapes for number in batch],
        )  # fmt: skip
        where = str(Path(model).resolve()) if model not in EMBEDDED and Path(model).is_dir() else model
        description = replace(compiled.description, model=where, call=shapes[0])
        compiled = replace(compiled, description=description)
        report(f"writing {folder}")
        compiled.save(folder)
        calls = [prompted(pipeline, caption, shapes[0], batch[0]) for caption in captions]
        measured, pictures = compare(pipeline, compiled, calls, seed, component=component, report=report)
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
        from recache_compile.recording import prompted
        from recache_compile.stand_in import accelerate

        check_file(output)
        report(f"loading {artifact}")
        compiled = load(artifact)
        facts = compiled.description
        dtype = getattr(torch, facts.dtype)
        pipeline = load_pipeline(facts.model, dtype, **{facts.component: None})
        accelerate(pipeline, {facts.component: compiled}, budget)
        pipeline.set_progress_bar_config(disable=True)
        report("drawing")
        generator = torch.Generator().manual_seed(seed)
        arguments = {**prompted(pipeline, caption, facts.call), "num_inference_steps": facts.num_steps}
        images = getattr(pipeline(**arguments, generator=generator), "images", None)
        if images is None:
            raise ModelError(f"{facts.model}: the pipeline makes no images; use it from Python instead")
        picture = images[0]
        if max(picture.size) <= 128:
            picture = picture.resize((picture.width * scale, picture.height * scale), resample=0)
        with writing(output) as partial:
            picture.save(partial, format="PNG")
    chosen = getattr(pipeline, facts.component).budget
    _say(f"{output}  ({chosen} of {facts.num_steps} steps recomputed)")


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


@main.command("plan")
@click.argument("model")
@click.option("--budgets", type=Numbers("budgets"), default="5,10,15", show_default=True, help="Recompute steps k.")
@click.option(
    "--steps", type=click.IntRange(1), help="Denoising steps T.  [default: the usual number of a known model, else 50]"
)
@click.option("--forecaster", default="taylor", show_default=True, help="reuse, taylor, hicache or newton.")
@click.option("--order", default=1, show_default=True, help="The forecaster's order.")
@click.option("--policy", default="uniform", show_default=True, help="As for compile.")
@click.option("--granularity", default="stack", show_default=True, help="output, stack, block or module.")
@click.option("--residual/--absolute", default=None, help="As for compile.")
@click.option("--hoist/--no-hoist", default=True, show_default=True, help="As for compile.")
@click.option("--call", type=JsonObject(), default="{}", help="Further arguments of the pipeline.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
def plan_command(
    model: str,
    budgets: tuple[int, ...],
    steps: int | None,
    forecaster: str,
    order: int,
    policy: str,
    granularity: str,
    residual: bool | None,
    hoist: bool,
    call: dict[str, Any],
    as_json: bool,
) -> None:
    """Show what compiling MODEL would cost and save, without its weights.

    MODEL is the name of a known model (such as flux.1-dev), a JSON file that describes one,
    or whatever compile takes.
    """
    with _progress() as report:
        report("loading libraries")
        from recache_compile.api import compile_options
        from recache_compile.planning import find_abstract, plan_model, print_plan

        report(f"building {model}")
        abstract = find_abstract(model, 50 if steps is None else steps, call)
        steps = abstract.num_steps if steps is None else steps
        options = compile_options(budgets, steps, forecaster, order, policy, granularity, hoist, residual)
        facts = plan_model(abstract, options, report)
    if as_json:
        click.echo(json.dumps(asdict(facts)))
    else:
        print_plan(facts, PAGE)


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
