"""`recache-compile MODEL --budgets 5,10,15`: compile, compare, show."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.markup import escape
from rich.table import Table

from recache_compile.cli.building import RUNTIME_HELP, cache_size_option, chosen_runtime, tensorrt_options
from recache_compile.cli.console import DTYPES, PAGE, SEED, notice, say, showing_stages
from recache_compile.cli.parameters import Budgets, JsonObject, Numbers, Size, Words, check_call

if TYPE_CHECKING:
    from recache_compile.evaluation.compilation import Compilation


@click.command("compile")
@click.argument("model")
@click.option(
    "--budgets",
    type=Budgets(),
    default="5,10,15",
    show_default=True,
    help="Recompute steps k, or shares of all steps (20%); one set of engines for all.",
)
@click.option(
    "--steps",
    default=50,
    show_default=True,
    help="Denoising steps T that schedules are made for; others can be run as well.",
)
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
@click.option("--cuda-graphs", is_flag=True, help="Replay CUDA graphs instead of calling engines.")
@click.option("--batching", is_flag=True, help="Also build an engine for several requests at once.")
@click.option(
    "--free", type=Words(), default="", help="What engines leave free beside what differs: text, size, batch."
)
@click.option("--fixed-sizes", is_flag=True, help="Engines for every size apart, and for these alone.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
@cache_size_option
@tensorrt_options
def compile_command(
    model: str,
    budgets: tuple[int | float, ...],
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
    batching: bool,
    free: tuple[str, ...],
    fixed_sizes: bool,
    as_json: bool,
    **building: Any,
) -> None:
    """Compile MODEL (`shapes`, a diffusers folder or a Hub id) and show what each budget gives."""
    folder = output or Path(f"{Path(model).resolve().name}-recache")
    with showing_stages():
        from recache_compile.config import CompileConfig
        from recache_compile.evaluation.compilation import CompileRequest, compile_model
        from recache_compile.ir.forecasters import anchors_of, check_forecaster
        from recache_compile.pipelines.varied import check_wishes
        from recache_compile.support.devices import usable_device

        check_forecaster(forecaster, order)
        check_call(call, batch)
        config = CompileConfig(
            num_steps=steps,
            anchors=anchors_of(forecaster, order),
            granularity=granularity,  # type: ignore[arg-type]
            residual=residual,
            hoist=hoist,
            dtype=dtype,
            device=str(usable_device(device)),
            component=component,
            call=call,
            cuda_graphs=cuda_graphs,
            batching=batching,
            free_sizes=not fixed_sizes,
        )
        check_wishes(free, config)
        request = CompileRequest(model, config, budgets, forecaster, order, policy, sizes, batch, prompts, seed, free)
        made = compile_model(request, folder, chosen_runtime(runtime, building, notice))
    if as_json:
        click.echo(json.dumps({"model": model, **made.facts()}))
        return
    print_measured(made)
    say(f"artifact  {folder}\n" + (f"picture   {made.picture}" if made.picture else made.reason))


def print_measured(made: "Compilation") -> None:
    """The table that ends a compilation."""
    about = made.facts()
    title = (
        f"{made.compiled.description.model}: {about['num_steps']} steps, {about['forecaster']} order {about['order']},"
        f" {about['policy']}, {about['runtime']}"
    )
    table = Table(title=escape(title))
    for column in ("budget", "recompute steps", "MACs", "speed", "PSNR", "SSIM"):
        table.add_column(column, justify="left" if column == "recompute steps" else "right")
    for each in made.measured:
        table.add_row(
            str(each.budget),
            " ".join(map(str, each.recompute_steps)),
            f"÷ {each.macs_reduction:.2f}",
            "-" if each.speedup is None else f"× {each.speedup:.2f}",
            "-" if each.psnr is None else f"{each.psnr:.1f} dB",
            "-" if each.ssim is None else f"{each.ssim:.3f}",
        )
    PAGE.print(table)
