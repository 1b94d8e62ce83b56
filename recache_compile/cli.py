"""The command line: `recache-compile MODEL --budgets 5,10,15` and its sisters."""

import contextlib
import itertools
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
@click.option("--forecaster", default="taylor", show_default=True, help="reuse, taylor, hicache, newton or fitted.")
@click.option("--order", default=1, show_default=True, help="The forecaster's order.")
@click.option(
    "--policy",
    default="auto",
    show_default=True,
    help="auto (trained for the model if there is one, else gram), gram, a trained policy's folder, uniform,"
    " uniform:warmup=3, front-loaded:power=2, dp, minimax, teacache, magcache, a schedule file, steps or a mask.",
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
        from recache_compile.choosing import CALIBRATIONS
        from recache_compile.files import check_file
        from recache_compile.loading import EMBEDDED, load_pipeline
        from recache_compile.measure import compare
        from recache_compile.picture import save_comparison
        from recache_compile.recording import prompted, record_examples
        from recache_compile.runtimes.registry import get_runtime

        checked = "uniform" if policy == "auto" else policy  # what it stands for depends on the pipeline
        compile_options(budgets, steps, forecaster, order, checked, granularity, hoist, residual)
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
            calibrate=[
                prompted(pipeline, caption, shapes[0], batch[0])
                for caption in itertools.islice(itertools.cycle(captions), CALIBRATIONS)
            ],
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
@click.option("--forecaster", default="taylor", show_default=True, help="reuse, taylor, hicache, newton or fitted.")
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


@main.command("train")
@click.argument("model")
@click.option("--budgets", type=Numbers("budgets"), default="5,10,15", show_default=True, help="Recompute steps k.")
@click.option("--steps", type=click.IntRange(2), default=50, show_default=True, help="Denoising steps T.")
@click.option("--forecaster", default="taylor", show_default=True, help="As for compile.")
@click.option("--order", default=1, show_default=True, help="The forecaster's order.")
@click.option("--granularity", default="stack", show_default=True, help="As for compile.")
@click.option("--out", type=click.Path(path_type=Path), default="policy", show_default=True, help="Folder to write.")
@click.option(
    "--method",
    type=click.Choice(["search", "recache"]),
    default="search",
    show_default=True,
    help="search: race and climb, then fit and refine a policy; recache: REINFORCE from scratch.",
)
@click.option("--samples", type=click.IntRange(1), default=48, show_default=True, help="To choose schedules on.")
@click.option("--held-out", type=click.IntRange(1), default=64, show_default=True, help="Samples to judge them on.")
@click.option("--batch", type=click.IntRange(1), default=16, show_default=True, help="Samples that run together.")
@click.option("--distance", default="auto", show_default=True, help="auto, lpips, ssim, mse or features (shapes).")
@click.option("--reward", default="none", show_default=True, help="none, clip, hpsv2, imagereward or caption (shapes).")
@click.option("--alpha", type=float, default=7.0, show_default=True, help="Weight of the reward in the loss.")
@click.option("--prompts", type=click.Path(path_type=Path), help="Text file, one caption a line.")
@click.option("--effort", type=click.FloatRange(0.01), default=1.0, show_default=True, help="Scales how much is tried.")
@click.option("--seed", type=SEED, default=0, show_default=True)
@click.option("--dtype", type=click.Choice(DTYPES), default="float32", show_default=True, help="Type of the weights.")
@click.option("--runtime", default="auto", show_default=True, help="auto, inductor or eager.")
@click.option("--call", type=JsonObject(), default="{}", help="Further arguments of the pipeline.")
@click.option("--component", default="transformer", show_default=True, help="Which transformer of the pipeline.")
@click.option("--workers", type=click.IntRange(0), default=0, help="Ray workers on this machine.  [default: none]")
@click.option("--ray-address", help="Join this Ray cluster; --out must be on a file system that it shares.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
def train_command(
    model: str,
    budgets: tuple[int, ...],
    steps: int,
    forecaster: str,
    order: int,
    granularity: str,
    out: Path,
    method: str,
    samples: int,
    held_out: int,
    batch: int,
    distance: str,
    reward: str,
    alpha: float,
    prompts: Path | None,
    effort: float,
    seed: int,
    dtype: str,
    runtime: str,
    call: dict[str, Any],
    component: str,
    workers: int,
    ray_address: str | None,
    as_json: bool,
) -> None:
    """Find schedules for MODEL that keep its results, and train a policy for --policy.

    Stopped at any time, the same command goes on where it was.
    """
    with _progress() as report:
        report("loading libraries")
        from recache_compile.training import TRAINERS, Effort, check_out, study_of, train
        from recache_compile.training_view import showing, table_of

        study = study_of(
            model, steps, forecaster, order, granularity, distance, reward, prompts, batch, seed, dtype, component,
            runtime, call,
        )  # fmt: skip
        check_out(study, budgets, out)
        trainer = TRAINERS[method]().scaled(effort)
        weight = 0.0 if study.reward == "none" else alpha
        spent = Effort(-(-samples // batch), -(-held_out // batch), weight, seed, workers, ray_address)
    try:
        with showing(LOG, trainer, len(budgets)) as (report, progress):
            trained = train(study, budgets, out, trainer, spent, report, progress)
    except KeyboardInterrupt:
        raise click.ClickException(
            f"stopped; what was found is in {out}, and the same command goes on from there"
        ) from None
    if as_json:
        click.echo(json.dumps({**trained.policy.facts, "policy": str(out), "generations": trained.generations}))
        return
    PAGE.print(table_of(trained))
    _say(f"policy    {out}\ncurves    {out / 'training.png'}\nschedules {out / 'schedules.png'}")


@main.command("schedules")
@click.argument("policies", metavar="POLICY...", nargs=-1, required=True)
@click.option("--budgets", type=Numbers("budgets"), default="5,10,15", show_default=True, help="Recompute steps k.")
@click.option("--steps", default=50, show_default=True, help="Denoising steps T.")
@click.option("--forecaster", default="taylor", show_default=True, help="As for compile.")
@click.option("--order", default=1, show_default=True, help="The forecaster's order.")
@click.option("--model", help="Show the surrogate errors on this model too; gram, dp and others need it.")
@click.option("--output", type=click.Path(path_type=Path, dir_okay=False), default="schedules.png", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
def schedules_command(
    policies: tuple[str, ...],
    budgets: tuple[int, ...],
    steps: int,
    forecaster: str,
    order: int,
    model: str | None,
    output: Path,
    as_json: bool,
) -> None:
    """Show the schedules of each POLICY side by side.

    POLICY is a name such as uniform:warmup=3, a trained policy's folder, a file, steps or a mask.
    """
    with _progress() as report:
        report("loading libraries")
        from recache_compile.charts import draw_schedules
        from recache_compile.files import check_file
        from recache_compile.loading import load_pipeline
        from recache_compile.schedules import Question, calibration_of, compare_policies, facts_of, print_compared

        question = Question(policies, budgets, steps, forecaster, order)
        check_file(output)
        calibration = None
        if model is not None:
            report(f"loading {model}")
            pipeline = load_pipeline(model)
            captions = PROMPTS.get(type(pipeline).__name__, ("a photo of a cat in a garden",))
            calibration = calibration_of(pipeline, captions, steps, report)
        report("asking the policies")
        compared = compare_policies(question, calibration)
        draw_schedules(compared.policies, output)
    if as_json:
        click.echo(json.dumps({**facts_of(compared), "model": model, "picture": str(output)}))
        return
    print_compared(compared, PAGE)
    _say(f"picture   {output}")


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
