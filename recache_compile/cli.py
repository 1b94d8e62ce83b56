"""The command line: `recache-compile MODEL --budgets 5,10,15` and its sisters."""

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from recache_compile._version import __version__
from recache_compile.errors import ArtifactError, RecacheError, ScheduleError

LOG = Console(stderr=True)
PAGE = Console()

PROMPTS = {
    "shapes": (
        "a red circle left of a blue square on a dark background",
        "a yellow triangle above a magenta ring on a checkered background",
        "a green cross right of a cyan diamond on a striped background",
        "a blue ring below a yellow square on a light background",
    )
}


class _DefaultCommand(click.Group):
    """A group whose first word may be left out: then it is `compile`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        own = {"--help", "--version"}
        if args and args[0] not in self.commands and args[0] not in own:
            args = ["compile", *args]
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except RecacheError as error:
            raise click.ClickException(" ".join(str(error).split())) from error
        except click.UsageError as error:
            if not error.message:
                raise
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
@click.option("--seed", default=0, show_default=True, help="Seed of the first picture.")
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
    folder = output or Path(f"{Path(model).name}-recache")
    with _progress() as report:
        report("loading libraries")
        from dataclasses import replace

        from recache_compile.api import compile
        from recache_compile.artifact import check_writable
        from recache_compile.compiler import make_schedules
        from recache_compile.measure import compare
        from recache_compile.picture import save_comparison
        from recache_compile.pipelines import load_pipeline
        from recache_compile.policies.registry import get_policy
        from recache_compile.runtimes.registry import get_runtime

        make_schedules(get_policy(policy, steps), budgets, steps)
        get_runtime(runtime)
        check_writable(folder)
        report(f"loading {model}")
        pipeline = load_pipeline(model)
        captions = prompts or PROMPTS.get(model, ("a photo of a cat in a garden",))
        compiled = compile(
            pipeline, None, budgets, steps, forecaster, order, policy, granularity, runtime,
            hoist=hoist, call={"prompt": captions[0]}, report=report,
        )  # fmt: skip
        compiled = replace(compiled, description=replace(compiled.description, model=model))
        report(f"writing {folder}")
        compiled.save(folder)
        measured, pictures = compare(pipeline, compiled, captions, seed, report=report)
        picture = folder.with_name(f"{folder.name}.png")
        save_comparison(pictures, compiled.schedules, captions, picture)
    result = {
        "model": model,
        "artifact": str(folder),
        "picture": str(picture),
        "num_steps": steps,
        "forecaster": compiled.description.forecaster,
        "order": compiled.description.order,
        "policy": compiled.description.policy,
        "runtime": compiled.description.runtime,
        "budgets": [asdict(each) for each in measured],
    }
    if as_json:
        click.echo(json.dumps(result))
        return
    facts = compiled.description
    table = Table(
        title=f"{model}: {steps} steps, {facts.forecaster} order {facts.order}, {facts.policy}, {facts.runtime}"
    )
    for column in ("budget", "recompute steps", "MACs", "speed", "PSNR", "SSIM"):
        table.add_column(column, justify="left" if column == "recompute steps" else "right")
    for each in measured:
        table.add_row(
            str(each.budget),
            " ".join(map(str, each.recompute_steps)),
            f"÷ {each.macs_reduction:.2f}",
            f"x {each.speedup:.2f}",
            f"{each.psnr:.1f} dB",
            f"{each.ssim:.3f}",
        )
    PAGE.print(table)
    PAGE.print(f"artifact  {folder}\npicture   {picture}", highlight=False, soft_wrap=True)


@main.command("run")
@click.argument("artifact", type=click.Path(path_type=Path))
@click.argument("caption")
@click.option("--budget", type=int, help="Recompute steps k.  [default: the smallest in the artifact]")
@click.option("--seed", default=0, show_default=True)
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
        from recache_compile.pipelines import accelerate, load_pipeline

        report(f"loading {artifact}")
        compiled = load(artifact)
        pipeline = load_pipeline(compiled.description.model, transformer=None)
        accelerate(pipeline, compiled, budget)
        pipeline.set_progress_bar_config(disable=True)
        report("drawing")
        generator = torch.Generator().manual_seed(seed)
        steps = compiled.description.num_steps
        picture = pipeline(caption, num_inference_steps=steps, generator=generator).images[0]
        if max(picture.size) <= 128:
            picture = picture.resize((picture.width * scale, picture.height * scale), resample=0)
        _save_picture(picture, output)
    PAGE.print(
        f"{output}  ({pipeline.transformer.budget} of {steps} steps recomputed)", highlight=False, soft_wrap=True
    )


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
        click.echo(json.dumps(facts))
    else:
        assert facts is not None
        print_facts(facts, PAGE)


def _save_picture(picture: Any, output: Path) -> None:
    partial = output.with_name(f".{output.name}.partial")
    try:
        picture.save(partial, format="PNG")
        partial.replace(output)
    except OSError as error:
        raise ArtifactError(f"output {output}: cannot be written ({error.strerror})") from None


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """A spinner with the current stage; one line a stage where there is no terminal."""
    if not LOG.is_terminal:
        yield lambda stage: LOG.print(stage, highlight=False, soft_wrap=True)
        return
    with LOG.status("starting") as status:
        yield lambda stage: status.update(stage)


if __name__ == "__main__":
    sys.exit(main())
