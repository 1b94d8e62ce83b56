"""What sizes that are free cost: engines for one size beside engines that were captured for any.

    python benchmarks/free_sizes.py --json benchmarks/results/free-sizes.json

Models of random weights; the free ones are built from two calls that differ in the length of the text and
in the size of the picture.  Both are then called at the sizes of the first, in turn: the recompute engine, and the
prologue's for a row of every step.
"""

import statistics
import time
from pathlib import Path
from typing import Any

import click
import torch
from apart import conditions, write
from torch import Tensor

import recache_compile as rc
from recache_compile.bench.workload import BenchRequest, make_workload
from recache_compile.config import CompileConfig
from recache_compile.runtimes.base import Variant

BUDGET, STEPS = 5, 20
VARYING = {
    "flux": {"hidden_states": 1, "img_ids": 0, "encoder_hidden_states": 1, "txt_ids": 0},
    "wan": {"hidden_states": 4, "encoder_hidden_states": 1},
    "sd3": {"hidden_states": 3, "encoder_hidden_states": 1},
}
"""Dimensions in which the calls of a model differ."""


def larger(inputs: dict[str, Any], model: str) -> dict[str, Any]:
    """The same call with half as much again of what varies."""
    varying = VARYING[model.partition("-")[0]]
    return {
        name: torch.cat([value, value.narrow(varying[name], 0, value.shape[varying[name]] // 2)], varying[name])
        if name in varying
        else value
        for name, value in inputs.items()
    }


def arguments(variant: Variant, program: str) -> list[Tensor]:
    """Random inputs of a program, at the sizes of the first call and with a row for each step."""
    torch.manual_seed(0)
    return [
        torch.rand([STEPS if size is None else size for size in value.shape]).to(value.dtype)
        for value in variant.programs[program].inputs
    ]


def measure(model: str, runtime: str, rounds: int) -> dict[str, Any]:
    """Seconds of an engine for one size, and of one for any, by program."""
    workload = make_workload(BenchRequest(model, BUDGET, CompileConfig(num_steps=STEPS)))
    calls = [dict(workload.inputs), larger(dict(workload.inputs), model)]
    variants, taken = {}, {}
    for kind, examples in (("fixed", calls[:1]), ("free", calls)):
        begin = time.perf_counter()
        compiled = rc.compile(
            workload.module, examples, budgets=(BUDGET,), num_steps=STEPS, policy="uniform", runtime=runtime
        )
        taken[kind] = time.perf_counter() - begin
        (variants[kind],) = compiled.variants
    found: dict[str, Any] = {"compile": taken, "programs": {}}
    for program in ("recompute", "prologue"):
        given = {kind: arguments(variant, program) for kind, variant in variants.items()}
        seconds: dict[str, list[float]] = {kind: [] for kind in variants}
        for number in range(-3, rounds):
            for kind, variant in variants.items():
                begin = time.perf_counter()
                variant.engines[program](given[kind])
                if number >= 0:
                    seconds[kind].append(time.perf_counter() - begin)
        medians = {kind: statistics.median(each) for kind, each in seconds.items()}
        found["programs"][program] = {**medians, "ratio": medians["free"] / medians["fixed"]}
    return found


@click.command()
@click.option("--models", default="flux-small,flux-medium,wan-small,sd3-small", show_default=True)
@click.option("--runtimes", default="inductor,onnxruntime", show_default=True)
@click.option("--rounds", default=60, show_default=True)
@click.option("--json", "json_file", type=click.Path(path_type=Path, dir_okay=False), help="Write the numbers here.")
@torch.no_grad()
def main(models: str, runtimes: str, rounds: int, json_file: Path | None) -> None:
    """Measure; see the file's head."""
    found: dict[str, Any] = {**conditions(), "rounds": rounds, "models": {}}
    for model in models.split(","):
        for runtime in runtimes.split(","):
            line = found["models"].setdefault(model, {})[runtime] = measure(model, runtime, rounds)
            write(found, json_file)
            ratios = ", ".join(f"{name} {each['ratio']:.3f}" for name, each in line["programs"].items())
            click.echo(f"{model}, {runtime}: free over fixed: {ratios}")


if __name__ == "__main__":
    main()
