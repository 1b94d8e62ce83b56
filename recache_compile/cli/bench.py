"""`recache-compile bench`: ours beside what people use today, on this machine."""

import json
from pathlib import Path
from typing import Any

import click

from recache_compile.cli.building import RUNTIME_HELP
from recache_compile.cli.console import DTYPES, PAGE, say, showing_stages
from recache_compile.cli.parameters import JsonObject


@click.command("bench")
@click.argument("model")
@click.option("--steps", type=click.IntRange(2), help="Denoising steps T.  [default: 20, or the artifact's]")
@click.option("--budget", type=click.IntRange(1), help="Recompute steps k.  [default: 5, or the artifact's smallest]")
@click.option("--order", type=click.IntRange(0), default=1, show_default=True, help="Order of all forecasts.")
@click.option("--runtime", default="auto", show_default=True, help=RUNTIME_HELP)
@click.option("--rounds", type=click.IntRange(1), default=7, show_default=True, help="Timed generations of each.")
@click.option("--only", help="Names of those to measure, separated by commas.  [default: all that are installed]")
@click.option("--dtype", type=click.Choice(DTYPES), default="float32", show_default=True)
@click.option("--device", help="cpu, cuda or cuda:1.  [default: a CUDA GPU where there is one, else cpu]")
@click.option("--threads", type=click.IntRange(1), help="CPU threads of each.  [default: all cores]")
@click.option("--call", type=JsonObject(), default="{}", help="Further arguments of the pipeline.")
@click.option(
    "--compare", type=click.Path(path_type=Path, dir_okay=False), help="JSON of another run: a column with the ratio."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
def bench_command(
    model: str,
    steps: int | None,
    budget: int | None,
    order: int,
    runtime: str,
    rounds: int,
    only: str | None,
    dtype: str,
    device: str | None,
    threads: int | None,
    call: dict[str, Any],
    compare: Path | None,
    as_json: bool,
) -> None:
    """Time MODEL uncached, compiled here, and under the caches of diffusers and cache-dit.

    MODEL is a known model with random weights (flux-small, flux-medium, wan-small, sd3-small,
    flux.1-dev ...), a JSON file that describes one, an artifact, or whatever compile takes.
    Everyone recomputes the same steps, in a process of its own, one generation in turn.
    """
    with showing_stages():
        from recache_compile.bench.page import check_same, print_result, read_bench, summary
        from recache_compile.bench.session import run
        from recache_compile.bench.subjects import OURS, chosen_subjects
        from recache_compile.bench.workload import make_request
        from recache_compile.config import CompileConfig
        from recache_compile.support.devices import usable_device

        subjects = chosen_subjects(only)
        other = None if compare is None else read_bench(compare)
        place = str(usable_device(device))
        config = CompileConfig(
            num_steps=steps or 20, anchors=order + 1, runtime=runtime, dtype=dtype, device=place, call=call
        )
        request, schedule = make_request(model, config, steps, budget, threads or 0)
        if other is not None and compare is not None:
            check_same(other, request, compare)
        result = run(request, schedule, subjects, rounds)
    facts = summary(result, OURS)
    if as_json:
        click.echo(json.dumps({**result.json(), **facts}))
        return
    print_result(result, other, PAGE)
    if "best_peer" in facts:
        say(f"{OURS} is {facts['times_faster']:.2f} times as fast as the fastest other cache ({facts['best_peer']})")
