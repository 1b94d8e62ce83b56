"""`recache-compile train`: find schedules on the true loss."""

import json
from pathlib import Path
from typing import Any

import click

from recache_compile.cli.console import DTYPES, LOG, PAGE, SEED, say, showing_stages
from recache_compile.cli.parameters import JsonObject, Numbers, check_finite, check_many_prompts


@click.command("train")
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
@click.option(
    "--held-out",
    type=click.IntRange(2),
    default=64,
    show_default=True,
    help="To accept a refinement on, and as many more to judge the result.",
)
@click.option("--batch", type=click.IntRange(1), default=16, show_default=True, help="Samples that run together.")
@click.option("--distance", default="auto", show_default=True, help="auto, lpips, ssim, mse or features (shapes).")
@click.option(
    "--reward",
    default="none",
    show_default=True,
    help="none, clip, hpsv2, imagereward; caption or attributes (shapes).",
)
@click.option(
    "--alpha",
    type=float,
    callback=check_finite,
    default=7.0,
    show_default=True,
    help="Weight of the reward in the loss; none without a reward.",
)
@click.option("--prompts", type=click.Path(path_type=Path), help="Text file, one caption a line.")
@click.option(
    "--effort",
    type=click.FloatRange(0.01),
    callback=check_finite,
    default=1.0,
    show_default=True,
    help="Scales how much is tried.",
)
@click.option("--seed", type=SEED, default=0, show_default=True)
@click.option("--dtype", type=click.Choice(DTYPES), default="float32", show_default=True, help="Type of the weights.")
@click.option("--runtime", default="auto", show_default=True, help="auto, inductor, onnxruntime or eager.")
@click.option("--call", type=JsonObject(), default="{}", help="Further arguments of the pipeline.")
@click.option("--component", default="transformer", show_default=True, help="Which transformer of the pipeline.")
@click.option(
    "--workers",
    type=click.IntRange(0),
    default=0,
    help="Ray workers, a CPU core or a share of a GPU each; on this machine without --ray-address.  [default: none]",
)
@click.option(
    "--ray-address",
    help="The --workers are processes of this Ray cluster; --out must be on a file system that it shares.",
)
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
    with showing_stages():
        from recache_compile.config import CompileConfig
        from recache_compile.ir.forecasters import anchors_of, check_forecaster
        from recache_compile.search.progress import show_training, table_of
        from recache_compile.search.train import TrainingRequest, train_policy

        check_many_prompts(call, workers, ray_address)
        check_forecaster(forecaster, order)
        config = CompileConfig(
            num_steps=steps, anchors=anchors_of(forecaster, order), granularity=granularity,  # type: ignore[arg-type]
            runtime=runtime, dtype=dtype, component=component, call=call,
        )  # fmt: skip
        request = TrainingRequest(
            model, budgets, config, forecaster, method, samples, held_out, batch, distance, reward, alpha, prompts,
            effort, seed, workers, ray_address,
        )  # fmt: skip
    try:
        with show_training(LOG, request.trainer, len(budgets)) as shown:
            trained = train_policy(request, out, *shown)
    except KeyboardInterrupt:
        kept = "goes on from where it was" if (out / "study").exists() else "begins anew, nothing was kept yet"
        raise click.ClickException(f"stopped; the same command with --out {out} {kept}") from None
    if as_json:
        click.echo(json.dumps({**trained.policy.facts, "policy": str(out)}))
        return
    PAGE.print(table_of(trained))
    say(f"policy    {out}\ncurves    {out / 'training.png'}\nschedules {out / 'schedules.png'}")
