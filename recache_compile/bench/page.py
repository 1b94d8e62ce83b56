"""The tables of a run, for people."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from recache_compile.bench.session import BenchLine, BenchResult
from recache_compile.bench.workload import BenchRequest
from recache_compile.errors import ModelError


def read_bench(file: Path) -> BenchResult:
    """A run that was kept.

    Raises:
        ModelError: the file is no result of `bench --json`.
    """
    try:
        return TypeAdapter(BenchResult).validate_json(file.read_bytes())
    except OSError as error:
        raise ModelError(f"{file}: cannot be read ({error.strerror}); name a file that bench --json wrote") from None
    except ValidationError as error:
        raise ModelError(f"{file}: is no result of bench --json ({error.errors()[0]['msg']})") from None


def check_same(other: BenchResult, request: BenchRequest, file: Path) -> None:
    """Raise unless another run was of the same model, steps, budget and type.

    Raises:
        ModelError: naming what differs.
    """
    facts = {
        "model": (other.request.model, request.model),
        "num_steps": (other.request.num_steps, request.num_steps),
        "budget": (other.request.budget, request.budget),
        "dtype": (other.request.config.dtype, request.config.dtype),
    }
    wrong = [f"{name} {theirs}" for name, (theirs, ours) in facts.items() if theirs != ours]
    if wrong:
        raise ModelError(f"compare {file}: is of {', '.join(wrong)}; ask for the same")


def print_result(result: BenchResult, other: BenchResult | None, page: Console) -> None:
    """Print two tables, speed and what it takes, then the subjects that were not measured."""
    request = result.request
    steps = " ".join(map(str, result.recompute_steps))
    page.print(
        f"{request.model}, T = {request.num_steps}, k = {request.budget} (steps {steps}), {request.config.dtype} on"
        f" {result.machine}, {result.rounds} interleaved rounds, medians",
        highlight=False, markup=False, soft_wrap=True,
    )  # fmt: skip
    page.print(_speed(result, other))
    page.print(_price(result))
    for name, reason in result.failed.items():
        page.print(
            f"not measured: {reason if reason.startswith(name) else f'{name}: {reason}'}", markup=False, soft_wrap=True
        )


def _speed(result: BenchResult, other: BenchResult | None) -> Table:
    base = result.lines[0].loop
    before = {line.name: line.loop for line in other.lines} if other else {}
    columns = ["", "loop s", "min to max s", f"× {result.lines[0].name}", "recompute ms", "cached ms", "/ ideal"]
    table = Table(*columns, *(["× before"] if other else []))
    for column in table.columns[1:]:
        column.justify = "right"
    for line in result.lines:
        low, high = line.spread
        cells = [
            escape(line.name),
            f"{line.loop:.3f}",
            f"{low:.3f} to {high:.3f}",
            f"{base / line.loop:.2f}",
            f"{line.recompute_step * 1e3:.2f}",
            "-" if line.cached_step is None else f"{line.cached_step * 1e3:.3f}",
            f"{line.over_ideal:.3f}",
        ]
        if other:
            cells.append(f"{before[line.name] / line.loop:.2f}" if line.name in before else "-")
        table.add_row(*cells)
    return table


def _price(result: BenchResult) -> Table:
    table = Table("", "prepare s", "first loop s", "graphs", "breaks", "recompiles", "held MB", "peak MB", "disk MB")
    for column in table.columns[1:]:
        column.justify = "right"
    for line in result.lines:
        table.add_row(
            escape(line.name),
            f"{line.prepare_seconds:.1f}",
            f"{line.first_loop:.2f}",
            *(str(count) for count in (line.graphs, line.graph_breaks, line.recompiles)),
            *(_megabytes(size) for size in (line.held_bytes, line.peak_bytes, line.disk_bytes)),
        )
    return table


def _megabytes(size: int | None) -> str:
    return "-" if size is None else f"{size / 1e6:.0f}"


def best_peer(lines: Mapping[str, BenchLine], ours: BenchLine) -> tuple[str, float] | None:
    """The fastest other subject that caches, and how many times `ours` is as fast."""
    peers = {name: line for name, line in lines.items() if line.cached_step is not None and line is not ours}
    if not peers:
        return None
    name = min(peers, key=lambda each: peers[each].loop)
    return name, peers[name].loop / ours.loop


def summary(result: BenchResult, ours: str) -> dict[str, Any]:
    """The two numbers that count: recache-compile against its ideal, and against the fastest other cache."""
    lines = {line.name: line for line in result.lines}
    if ours not in lines:
        return {}
    peer = best_peer(lines, lines[ours])
    return {"over_ideal": lines[ours].over_ideal} | ({"best_peer": peer[0], "times_faster": peer[1]} if peer else {})
