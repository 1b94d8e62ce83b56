"""Several requests at the same time: one after the other, in threads, and sharing their recompute calls.

    python benchmarks/batching.py

Generations of `shapes` with different captions, seeds and numbers of steps, on the same inductor engines:
how long all of them take, how long a lone one takes with and without a batcher, and how far the
results are from those that each request gets alone.  Rounds are interleaved, medians count.
"""

import copy
import json
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import torch
from apart import conditions, write
from torch import Tensor

import recache_compile as rc
from recache_compile.compiler.compiled import Compiled
from recache_compile.ir.program import REQUESTS
from recache_compile.pipelines.load import load_pipeline
from recache_compile.runtimes.base import Engine

STEPS = (50, 28, 50, 20)
CAPTIONS = (
    "a red circle left of a blue square on a dark background",
    "a blue ring above a red cross on a light background",
    "a green cross above a cyan diamond on a light background",
)


def request(pipeline: Any, number: int, budget: int) -> Tensor:
    """One generation, on a copy of the pipeline with a scheduler of its own."""
    own = copy.copy(pipeline)
    own.scheduler = copy.deepcopy(pipeline.scheduler)
    result: Tensor = own(
        CAPTIONS[number % len(CAPTIONS)],
        num_inference_steps=STEPS[number % len(STEPS)],
        budget=min(budget, STEPS[number % len(STEPS)]),
        generator=torch.Generator().manual_seed(number),
        output_type="pt",
    ).images
    return result


def counting(compiled: Compiled, sizes: Counter[int]) -> Compiled:
    """The same with recompute engines that count their calls by the number of requests in them."""

    def counted(name: str, engine: Engine) -> Callable[[Sequence[Tensor]], Sequence[Tensor]]:
        def call(inputs: Sequence[Tensor]) -> Sequence[Tensor]:
            sizes[len(inputs[0]) if name == REQUESTS else 1] += 1
            return engine(inputs)

        return call if name in ("recompute", REQUESTS) else engine

    variants = tuple(
        replace(each, engines={name: counted(name, engine) for name, engine in each.engines.items()})
        for each in compiled.variants
    )
    return replace(compiled, engines=replace(compiled.engines, variants=variants))


def measure(requests: int, budget: int, rounds: int, runtime: str, max_wait_ms: float) -> dict[str, Any]:
    """Seconds of every way, and what the batcher made of the calls."""
    pipeline = load_pipeline("shapes")
    pipeline.set_progress_bar_config(disable=True)
    compiled = rc.compile(
        pipeline, budgets=(budget,), policy="uniform", runtime=runtime, call={"prompt": CAPTIONS[0]}, batching=True
    )
    sizes: Counter[int] = Counter()
    one_by_one = rc.accelerate(copy.copy(pipeline), compiled, budget)
    together = rc.accelerate(copy.copy(pipeline), counting(compiled, sizes).batcher(requests, max_wait_ms), budget)
    pool = ThreadPoolExecutor(requests)
    ways: dict[str, Callable[[], list[Tensor]]] = {
        "one after the other": lambda: [request(one_by_one, number, budget) for number in range(requests)],
        "in threads": lambda: list(pool.map(lambda number: request(one_by_one, number, budget), range(requests))),
        "batched": lambda: list(pool.map(lambda number: request(together, number, budget), range(requests))),
        "one request alone": lambda: [request(one_by_one, 0, budget)],
        "one request alone, batcher": lambda: [request(together, 0, budget)],
    }
    taken: dict[str, list[float]] = {name: [] for name in ways}
    results: dict[str, list[Tensor]] = {}
    for number in range(rounds + 1):
        for name, run in ways.items():
            if "alone" in name:
                run()  # tables are there then, with the batcher as without
            begin = time.perf_counter()
            results[name] = run()
            if number:
                taken[name].append(time.perf_counter() - begin)
            if name == "batched" and number == rounds:
                shared = dict(sorted(sizes.items()))
            sizes.clear()
    medians = {name: statistics.median(times) for name, times in taken.items()}
    pairs = zip(results["batched"], results["one after the other"], strict=True)
    return {
        "requests": requests,
        "budget": budget,
        "steps": [STEPS[number % len(STEPS)] for number in range(requests)],
        "runtime": compiled.engines.config.runtime,
        "threads": torch.get_num_threads(),
        "max_wait_ms": max_wait_ms,
        "rounds": rounds,
        "seconds": medians,
        "throughput": medians["one after the other"] / medians["batched"],
        "lone_latency": medians["one request alone, batcher"] / medians["one request alone"],
        "requests_per_call": shared,
        "largest_error": max(float((ours - alone).abs().max()) for ours, alone in pairs),
        **conditions(),
    }


@click.command()
@click.option("--requests", default=8, show_default=True)
@click.option("--budget", default=10, show_default=True)
@click.option("--rounds", default=5, show_default=True)
@click.option("--runtime", default="inductor", show_default=True)
@click.option("--max-wait-ms", default=5.0, show_default=True)
@click.option("--json", "output", type=click.Path(path_type=Path), help="Write the result here as well.")
def main(requests: int, budget: int, rounds: int, runtime: str, max_wait_ms: float, output: Path | None) -> None:
    """Measure and print."""
    with torch.no_grad():
        result = measure(requests, budget, rounds, runtime, max_wait_ms)
    write(result, output)
    click.echo(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
