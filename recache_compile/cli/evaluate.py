"""`recache-compile evaluate`: quality beside cost."""

import json
import logging
import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from recache_compile.cli.building import RUNTIME_HELP
from recache_compile.cli.console import DTYPES, PAGE, SEED, say, showing_stages
from recache_compile.cli.parameters import JsonObject, Numbers, check_many_prompts


@click.command("evaluate")
@click.argument("model")
@click.option("--prompts", type=click.Path(path_type=Path), help="Text file, one caption a line.  [default: our own]")
@click.option(
    "--samples", type=click.IntRange(1), default=64, show_default=True, help="Results to judge, in whole batches."
)
@click.option("--budgets", type=Numbers("budgets"), help="Recompute steps k.  [default: the artifact's, else 5,10,15]")
@click.option(
    "--policy",
    "policies",
    multiple=True,
    help="As for compile; repeat for more.  [default: the artifact's, else auto and uniform]",
)
@click.option("--metrics", help="Separated by commas.  [default: psnr,ssim and those whose weights are here]")
@click.option(
    "--reference",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Folder of pictures that fid is the distance to.  [default: uncached samples of other noise]",
)
@click.option("--steps", type=click.IntRange(2), help="Denoising steps T.  [default: the artifact's, else 50]")
@click.option("--forecaster", help="As for compile.  [default: the artifact's, else taylor]")
@click.option("--order", type=click.IntRange(0), help="The forecaster's order.  [default: the artifact's, else 1]")
@click.option("--granularity", help="As for compile.  [default: the artifact's, else stack]")
@click.option("--runtime", help=RUNTIME_HELP)
@click.option(
    "--dtype", type=click.Choice(DTYPES), help="Type of the weights.  [default: the artifact's, else float32]"
)
@click.option("--device", help="cpu, cuda or cuda:1.  [default: the artifact's, else a GPU where there is one]")
@click.option("--component", help="Which transformer of the pipeline.  [default: the artifact's, else transformer]")
@click.option("--call", type=JsonObject(), default="{}", help="Further arguments of the pipeline.")
@click.option("--batch", type=click.IntRange(1), help="Samples that run together.  [default: 16; 1 of an artifact]")
@click.option("--seed", type=SEED, default=0, show_default=True, help="Of the first sample's noise.")
@click.option("--repeats", type=click.IntRange(1), default=3, show_default=True, help="Timed calls of each budget.")
@click.option(
    "--out", type=click.Path(path_type=Path), default="evaluation", show_default=True, help="Folder to write."
)
@click.option("--threads", type=click.IntRange(1), help="CPU threads while timing.  [default: all cores]")
@click.option("--workers", type=click.IntRange(0), default=0, help="Ray workers, as for train.  [default: none]")
@click.option("--ray-address", help="As for train; --out must be on a file system that the cluster shares.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
def evaluate_command(
    model: str,
    prompts: Path | None,
    samples: int,
    budgets: tuple[int, ...] | None,
    policies: tuple[str, ...],
    metrics: str | None,
    reference: Path | None,
    steps: int | None,
    forecaster: str | None,
    order: int | None,
    granularity: str | None,
    runtime: str | None,
    dtype: str | None,
    device: str | None,
    component: str | None,
    call: dict[str, Any],
    batch: int | None,
    seed: int,
    repeats: int,
    out: Path,
    threads: int | None,
    workers: int,
    ray_address: str | None,
    as_json: bool,
) -> None:
    """Judge what MODEL (a model or an artifact) gives at every budget against its uncached results.

    Metrics: psnr, ssim, lpips against the uncached result of the same noise; clip, hpsv2, imagereward
    against the prompt; fid of the whole set; vbench of videos; features, attributes, caption of shapes.
    Stopped at any time, the same command goes on where it was.
    """
    command = shlex.join(["recache-compile", *sys.argv[1:]])
    with showing_stages():
        import torch

        from recache_compile.config import changed
        from recache_compile.evaluation.page import print_result
        from recache_compile.evaluation.request import EvaluationRequest, base_config
        from recache_compile.evaluation.session import evaluate

        if threads:
            torch.set_num_threads(threads)
        check_many_prompts(call, workers, ray_address)
        config = changed(
            base_config(model),
            num_steps=steps,
            granularity=granularity,
            runtime=runtime,
            dtype=dtype,
            device=device,
            component=component,
            call=call or None,
        )
        request = EvaluationRequest(
            model, budgets, policies or None, config, forecaster, order, _names(metrics), prompts, samples, batch, seed,
            reference, repeats, workers, ray_address,
        )  # fmt: skip

        try:
            result = evaluate(request, out, command, show_batches)
        except KeyboardInterrupt:
            raise click.ClickException(
                f"stopped; the same command with --out {out} goes on from where it was"
            ) from None
    if as_json:
        click.echo(json.dumps({**asdict(result), "out": str(out)}))
        return
    print_result(result, PAGE)
    say(f"folder    {out}\npage      recache-compile report {out}")


def show_batches(done: int, asked: int) -> None:
    """Tell how many batches are judged."""
    if asked:
        logging.getLogger(__name__).info("drawing and judging: %d of %d batches", done, asked)


def _names(text: str | None) -> tuple[str, ...] | None:
    """Names that are separated by commas."""
    return None if text is None else tuple(part.strip() for part in text.split(",") if part.strip())
