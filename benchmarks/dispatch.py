"""What the dispatcher itself takes: microseconds of a call, with engines that do nothing.

    python benchmarks/dispatch.py

Calls of flux-small, of one and of two guidance branches, under a plan of T = 50 steps; medians of
the cached and of the recompute steps.  What is left out is what engines compute, nothing else.
"""

import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import torch
from apart import conditions, write
from torch import Tensor

import recache_compile as rc
from recache_compile.bench.workload import BenchRequest, Workload, make_workload, peers_schedule
from recache_compile.compiler.compiled import Compiled
from recache_compile.config import CompileConfig
from recache_compile.ir.forecasters import Taylor
from recache_compile.runtimes.base import Engine, Variant, new_outputs

STEPS, BUDGET = 50, 10
CONDITIONING = ("encoder_hidden_states", "pooled_projections", "guidance")


def idle(variant: Variant) -> Variant:
    """The same with engines that return the same tensors every time."""

    def engine(name: str) -> Engine:
        program, ready = variant.programs[name], {}

        def call(inputs: Sequence[Tensor]) -> Sequence[Tensor]:
            rows = tuple(tensor.shape[0] for tensor in inputs if tensor.dim())
            if rows not in ready:
                ready[rows] = new_outputs(program, inputs, variant.device)
            return ready[rows]

        return call  # type: ignore[return-value]

    return replace(variant, engines={name: engine(name) for name in variant.engines})


def build() -> tuple[Compiled, Workload]:
    """Idle engines of flux-small, and its call."""
    config = CompileConfig(num_steps=STEPS, anchors=2, runtime="eager")
    workload = make_workload(BenchRequest("flux-small", BUDGET, config))
    schedule, _, _ = peers_schedule(STEPS, BUDGET)
    engines = rc.build_engines(workload.module, [workload.example], config)
    idle_engines = replace(engines, variants=tuple(map(idle, engines.variants)))
    return idle_engines.with_plans({BUDGET: schedule}, Taylor(1)), workload


def measure(rounds: int) -> dict[str, Any]:
    """Microseconds of one call by number of branches and kind of step."""
    compiled, workload = build()
    recompute = set(compiled.schedules[BUDGET].recompute_steps)
    found: dict[str, Any] = {}
    for branches in (("",), ("cond", "uncond")):
        given = [
            {name: value + number if name in CONDITIONING else value for name, value in workload.inputs.items()}
            for number, _ in enumerate(branches)
        ]
        run = compiled.dispatcher(BUDGET)
        taken: dict[str, list[float]] = {"first step": [], "recompute step": [], "cached step": []}
        for number in range(rounds + 1):
            run.reset()
            for step in range(STEPS):
                kind = "first step" if step == 0 else "recompute step" if step in recompute else "cached step"
                for branch, arguments in zip(branches, given, strict=True):
                    call = {**workload.at(step), **{name: arguments[name] for name in CONDITIONING}}
                    begin = time.perf_counter()
                    run(step=step, branch=branch, **call)
                    if number:
                        taken[kind].append(1e6 * (time.perf_counter() - begin))
        found[f"{len(branches)} branch{'es' * (len(branches) > 1)}"] = {
            kind: round(statistics.median(values), 1) for kind, values in taken.items()
        }
    return found


@click.command()
@click.option("--rounds", default=40, show_default=True, help="Generations that are timed.")
@click.option("--json", "json_file", type=click.Path(path_type=Path, dir_okay=False), help="Write the numbers here.")
@torch.no_grad()
def main(rounds: int, json_file: Path | None) -> None:
    """Measure; see the file's head."""
    torch.set_num_threads(1)
    found = {**conditions(), "steps": STEPS, "budget": BUDGET, "microseconds": measure(rounds)}
    for branches, kinds in found["microseconds"].items():
        click.echo(f"{branches}: " + ", ".join(f"{kind} {value:.1f} us" for kind, value in kinds.items()))
    write(found, json_file)


if __name__ == "__main__":
    main()
