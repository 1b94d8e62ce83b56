"""What a recompute step is made of: matrix products, attention, the rest, against the machine's arithmetic limit.

    python benchmarks/recompute.py --models flux-small,flux-medium --dtypes float32,bfloat16 --threads 1,2

The engine of a step runs in turn with the same products (`torch.mm` of the same shapes, each with weights of
its own) and the same attention, called one after another without anything in between; what the engine takes
longer is the rest.  The limit is what all multiply-accumulates take at the rate of a large square product.
Every line has a process of its own.  On one thread the processor's time is counted, which other work on the
machine disturbs least; on several it is the clock's.
"""

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from math import prod
from pathlib import Path
from typing import Any

import click
import torch
from apart import answer_of, conditions, write
from loop import Sizes, build_inputs, build_model, timetable
from rich.console import Console
from rich.table import Table
from torch.nn import functional

import recache_compile as rc
from recache_compile.ir.cost import count_macs
from recache_compile.ir.meta import tensor_of
from recache_compile.ir.program import Program
from recache_compile.passes.base import with_values
from recache_compile.passes.ops import aten, packet
from recache_compile.runtimes.inductor import Inductor

CPU = torch.device("cpu")
STEPS, BUDGET = 4, 2
MODELS = {
    "flux-small": {"blocks": (2, 4), "width": 128, "tokens": 64, "text_tokens": 16},
    "flux-medium": {"blocks": (4, 8), "width": 512, "tokens": 256, "text_tokens": 64},
}
"""The shapes of `bench`'s models of these names."""

SQUARE = 1024
"""Sides of the product that tells the machine's rate."""

LOG = Console(stderr=True, highlight=False)
Call = Callable[[], Any]


def product_shapes(program: Program) -> list[tuple[int, int, int]]:
    """Rows, columns and inner size of every matrix product with a weight."""
    found = []
    for node in program.module.graph.nodes:
        if packet(node) is aten.linear:
            value, weight = (tensor_of(each) for each in node.args[:2])
            found.append((prod(value.shape[:-1]), *weight.shape))
    return found


def attention_shapes(program: Program) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Shapes of the queries and of the keys of every attention."""
    calls = [node for node in program.module.graph.nodes if packet(node) is aten.scaled_dot_product_attention]
    return [(tuple(tensor_of(node.args[0]).shape), tuple(tensor_of(node.args[1]).shape)) for node in calls]


def products(program: Program, dtype: torch.dtype) -> Call:
    """All products of a program, one after another."""
    given = [
        (torch.randn(rows, inner).to(dtype), torch.randn(columns, inner).to(dtype).t(), torch.empty(rows, columns, dtype=dtype))
        for rows, columns, inner in product_shapes(program)
    ]  # fmt: skip
    return lambda: [torch.mm(value, weight, out=result) for value, weight, result in given]


def attentions(program: Program, dtype: torch.dtype) -> Call:
    """All attention of a program, one after another, on dense values."""
    given = [
        [torch.randn(shape).to(dtype) for shape in (queries, keys, keys)] for queries, keys in attention_shapes(program)
    ]
    return lambda: [functional.scaled_dot_product_attention(*each) for each in given]


def measure(model: str, dtype: str, threads: int, rounds: int) -> dict[str, Any]:
    """One line, in this process."""
    torch.set_num_threads(threads)
    sizes = Sizes(**MODELS[model], steps=STEPS, budget=BUDGET, device="cpu", dtype=dtype)  # type: ignore[arg-type]
    compiled = rc.compile(
        build_model(sizes),
        build_inputs(sizes),
        budgets=(BUDGET,),
        num_steps=STEPS,
        runtime="eager",
        timesteps={"timestep": timetable(sizes)},
    )
    program, kind = compiled.variants[0].programs["recompute"], getattr(torch, dtype)
    given = [torch.rand(value.shape).to(value.dtype) for value in program.inputs]  # type: ignore[arg-type]
    program = with_values(program, given)  # which one from the cache does not have
    with tempfile.TemporaryDirectory() as folder:  # of all programs this one alone is lowered
        files = [Path(folder) / "recompute.pt2"]
        Inductor().lower(program, CPU, files)
        engine = Inductor().load(program, files, program.weights, CPU)
    square = torch.randn(SQUARE, SQUARE).to(kind)
    calls: dict[str, Call] = {
        "step": lambda: engine(given),
        "products": products(program, kind),
        "attention": attentions(program, kind),
        "square": lambda: torch.mm(square, square),
    }
    clock = time.process_time if threads == 1 else time.perf_counter
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(-2, rounds):
        for name, call in calls.items():
            begin = clock()
            call()
            once = clock() - begin
            if number >= 0:  # those before warm up
                taken[name].append(once)
    median = {name: statistics.median(times) for name, times in taken.items()}
    rate = SQUARE**3 / min(taken["square"])
    macs = count_macs(program, CPU)
    return {
        "model": model,
        "dtype": dtype,
        "threads": threads,
        **{name: median[name] for name in ("step", "products", "attention")},
        "rest": median["step"] - median["products"] - median["attention"],
        "macs": macs,
        "macs_per_second": rate,
        "limit": macs / rate,
        "products_over_limit": median["products"] * rate / sum(map(prod, product_shapes(program))),
    }


def measure_in_own_process(model: str, dtype: str, threads: int, rounds: int) -> dict[str, Any]:
    """The same in a process with its own number of threads."""
    options = ["--in-this-process", f"{model},{dtype},{threads}", "--rounds", str(rounds)]
    return answer_of(__file__, options, {"OMP_NUM_THREADS": str(threads)})  # type: ignore[no-any-return]


def show(lines: Sequence[dict[str, Any]]) -> None:
    """Print the table."""
    table = Table("", "threads", "step ms", "products", "attention", "rest", "limit ms", "step / limit")
    for line in lines:
        table.add_row(
            f"{line['model']}, {line['dtype']}", str(line["threads"]), f"{line['step'] * 1e3:.2f}",
            *(f"{line[part] / line['step']:.0%}" for part in ("products", "attention", "rest")),
            f"{line['limit'] * 1e3:.2f}", f"{line['step'] / line['limit']:.2f}",
        )  # fmt: skip
    Console().print(table)


@click.command()
@click.option("--models", default=",".join(MODELS), show_default=True)
@click.option("--dtypes", default="float32,bfloat16", show_default=True)
@click.option("--threads", default="1,2", show_default=True)
@click.option("--rounds", default=50, show_default=True)
@click.option("--json", "json_file", type=click.Path(path_type=Path, dir_okay=False), help="Write the numbers here.")
@click.option("--in-this-process", hidden=True)
@torch.no_grad()
def main(
    models: str, dtypes: str, threads: str, rounds: int, json_file: Path | None, in_this_process: str | None
) -> None:
    """Measure; see the file's head."""
    if in_this_process is not None:
        model, dtype, number = in_this_process.split(",")
        click.echo(json.dumps(measure(model, dtype, int(number), rounds)))
        return
    lines = []
    for model in models.split(","):
        for dtype in dtypes.split(","):
            for number in map(int, threads.split(",")):
                LOG.rule(f"{model}, {dtype}, {number}")
                lines.append(measure_in_own_process(model, dtype, number, rounds))
    show(lines)
    write({**conditions(), "load": round(os.getloadavg()[0], 1), "rounds": rounds, "lines": lines}, json_file)


if __name__ == "__main__":
    main()
