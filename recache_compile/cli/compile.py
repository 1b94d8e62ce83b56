"""`recache-compile MODEL --budgets 5,10,15`: compile, compare, show."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.markup import escape
from rich.table import Table

from recache_compile.cli.building import RUNTIME_HELP, chosen_runtime, tensorrt_options
from recache_compile.cli.console import DTYPES, PAGE, SEED, notice, say, showing_stages
from recache_compile.cli.parameters import JsonObject, Numbers, Size, check_call
from recache_compile.errors import ArtifactError

if TYPE_CHECKING:
    from recache_compile.compiler.compiled import Compiled
    from recache_compile.evaluation.measure import Measured


@click.command("compile")
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
@click.option("--runtime", default="auto", show_default=True, help=RUNTIME_HELP)
@click.option("--dtype", type=click.Choice(DTYPES), default="float32", show_default=True, help="Type of the weights.")
@click.option("--device", help="cpu, cuda or cuda:1.  [default: a CUDA GPU where there is one, else cpu]")
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
@click.option("--cuda-graphs", is_flag=True, help="ReplayDispatcher CUDA graphs instead of calling engines.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
@tensorrt_options
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
    device: str | None,
    sizes: tuple[tuple[int, int], ...],
    batch: tuple[int, ...],
    call: dict[str, Any],
    component: str,
    output: Path | None,
    prompts: tuple[str, ...],
    seed: int,
    hoist: bool,
    cuda_graphs: bool,
    as_json: bool,
    **building: Any,
) -> None:
    """Compile MODEL (`shapes`, a diffusers folder or a Hub id) and show what each budget gives."""
    folder = output or Path(f"{Path(model).resolve().name}-recache")
    with showing_stages() as report:
        report("loading libraries")
        import torch

        from recache_compile.api import compile, compile_options
        from recache_compile.evaluation.measure import compare, unmeasured
        from recache_compile.evaluation.picture import save_comparison
        from recache_compile.pipelines.load import absolute, load_pipeline
        from recache_compile.pipelines.prompts import captions_for
        from recache_compile.pipelines.record import prompted, record_examples
        from recache_compile.search.default_policy import calibration_calls
        from recache_compile.support.devices import usable_device

        checked = "uniform" if policy == "auto" else policy  # what it stands for depends on the pipeline
        compile_options(budgets, steps, forecaster, order, checked, granularity, hoist, residual)
        place = usable_device(device)
        backend = chosen_runtime(runtime, building, notice)
        picture = _check_output(folder)
        report(f"loading {model}")
        pipeline = load_pipeline(model, getattr(torch, dtype), place)
        captions = prompts or captions_for(pipeline)
        check_call(call, batch)
        shapes = [{"width": width, "height": height, **call} for width, height in sizes] or [call]
        report("checking the prompts")
        for caption in captions[1:]:  # compiling records the first
            record_examples(pipeline, steps, prompted(pipeline, caption, shapes[0]), component)
        compiled = compile(
            pipeline, None, budgets, steps, forecaster, order, policy, granularity, backend,
            residual=residual, hoist=hoist, component=component, cuda_graphs=cuda_graphs, report=report,
            call=[prompted(pipeline, captions[0], each, number) for each in shapes for number in batch],
            calibrate=calibration_calls(pipeline, captions, shapes[0], batch[0]),
        )  # fmt: skip
        description = replace(compiled.description, model=absolute(model), call=shapes[0])
        compiled = replace(compiled, description=description)
        report(f"writing {folder}")
        compiled.save(folder)
        calls = [prompted(pipeline, caption, shapes[0], batch[0]) for caption in captions]
        why_not = "no picture: the pipeline makes no images"
        if backend.engine_device(place) == place:
            measured, pictures = compare(pipeline, compiled, calls, seed, component=component, report=report)
        else:
            measured, pictures = unmeasured(compiled), {}
            why_not = f"no picture: engines of {backend.name} do not run on {place}"
        if pictures:
            save_comparison(pictures, compiled.schedules, captions, picture)
    if as_json:
        files = {"artifact": str(folder), "picture": str(picture) if pictures else None}
        click.echo(json.dumps({"model": model, **files, **_facts(compiled, measured)}))
        return
    print_measured(compiled, measured)
    say(f"artifact  {folder}\n" + (f"picture   {picture}" if pictures else why_not))


def _check_output(folder: Path) -> Path:
    """The place of an artifact's picture, once both are known to be writable."""
    from recache_compile.artifact.store import check_writable
    from recache_compile.support.files import check_file

    check_writable(folder)
    picture = folder.with_name(f"{folder.name}.png")
    check_file(picture)
    if picture.exists() and not folder.exists():
        raise ArtifactError(f"output {folder}: its picture would replace {picture}; name another folder")
    return picture


def _facts(compiled: "Compiled", measured: "list[Measured]") -> "dict[str, Any]":
    """What `--json` prints of a compilation."""
    facts = compiled.description
    return {
        "num_steps": facts.num_steps,
        "forecaster": facts.forecaster,
        "order": facts.order,
        "policy": facts.policy,
        "runtime": facts.runtime,
        "budgets": [asdict(each) for each in measured],
    }


def print_measured(compiled: "Compiled", measured: "list[Measured]") -> None:
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
            "-" if each.speedup is None else f"× {each.speedup:.2f}",
            "-" if each.psnr is None else f"{each.psnr:.1f} dB",
            "-" if each.ssim is None else f"{each.ssim:.3f}",
        )
    PAGE.print(table)
