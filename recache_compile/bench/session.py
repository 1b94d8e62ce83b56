"""One run: every subject prepares, then rounds in which each makes one generation in turn."""

import datetime
import logging
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from recache_compile.bench.process import Process
from recache_compile.bench.subjects import OURS, UNCACHED
from recache_compile.bench.workload import BenchRequest
from recache_compile.errors import ModelError
from recache_compile.ir.schedule import Schedule
from recache_compile.support.machine import machine, versions

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class BenchLine:
    """What one subject gave; seconds are medians over the rounds.

    Args:
        name: of the subject.
        loop: of a whole generation.
        spread: the fastest and the slowest generation.
        recompute_step, cached_step: of one step; the first of a loop is left out.
        prepare_seconds: until the first step could be called.
        first_loop: the first generation, just-in-time compilation included.
        ideal: k recompute steps; of recache-compile, k calls of its recompute engine and one of its prologue,
            called alone.
        graphs, graph_breaks, recompiles: as Dynamo counts them.
        held_bytes: memory beyond the model's after the last round, on the device or the host.
        peak_bytes: the most memory of the process.
        disk_bytes: of what is shipped beside a checkpoint; of recache-compile instead of one.
        more: facts that only this subject has.
    """

    name: str
    loop: float
    spread: tuple[float, float]
    recompute_step: float
    cached_step: float | None
    prepare_seconds: float
    first_loop: float
    ideal: float
    graphs: int
    graph_breaks: int
    recompiles: int
    held_bytes: int
    peak_bytes: int
    disk_bytes: int | None
    more: dict[str, Any] = field(default_factory=dict)

    @property
    def over_ideal(self) -> float:
        """The loop's time over the ideal's."""
        return self.loop / self.ideal


@dataclass(frozen=True, slots=True)
class BenchResult:
    """One run of `bench`.

    Args:
        date, machine, versions: when and where it ran.
        request: what was asked for.
        recompute_steps: of all that cache.
        rounds: timed generations of each.
        lines: those that ran.
        failed: message by name of those that did not.
    """

    date: str
    machine: str
    versions: dict[str, str]
    request: BenchRequest
    recompute_steps: tuple[int, ...]
    rounds: int
    lines: tuple[BenchLine, ...]
    failed: dict[str, str]

    def json(self) -> dict[str, Any]:
        """Facts for `--json`, ratios to eager among them."""
        eager = next((line.loop for line in self.lines if line.name == UNCACHED[0]), None)
        lines = [
            {**asdict(line), "over_ideal": line.over_ideal, "speedup": None if eager is None else eager / line.loop}
            for line in self.lines
        ]
        return {**asdict(self), "lines": lines}


def run(request: BenchRequest, schedule: Schedule, subjects: Sequence[str], rounds: int) -> BenchResult:
    """Measure subjects side by side.

    A subject that fails is reported and left out; if recache-compile itself fails, that is an error.

    Args:
        request: what is measured.
        schedule: the steps that all recompute.
        subjects: names.
        rounds: timed generations of each; one more warms up.

    Raises:
        ModelError: the model cannot be made, or recache-compile failed.
    """
    processes: dict[str, Process] = {}
    prepared: dict[str, float] = {}
    failed: dict[str, str] = {}
    times: dict[str, list[dict[str, Any]]] = {}

    def ask(name: str, what: str) -> Any:
        try:
            return processes[name].ask(what)
        except ModelError as error:
            if name == OURS:
                raise
            failed[name] = str(error)
            log.info("left out: %s", error)
            processes.pop(name).close()
            return None

    try:
        for name in subjects:
            log.info("preparing %s", name)
            processes[name] = Process(name, request, schedule)
            if answer := ask(name, "prepare"):
                prepared[name] = answer["prepare_seconds"]
        for number in range(rounds + 1):
            log.info(f"round {number} of {rounds}" if number else "warming up")
            for name in list(processes):
                if answer := ask(name, "generation"):
                    times.setdefault(name, []).append(answer)
        facts = {name: answer for name in list(processes) if (answer := ask(name, "facts"))}
    finally:
        for process in processes.values():
            process.close()
    lines = tuple(_line(name, prepared[name], times[name], facts[name], schedule) for name in facts)
    today = datetime.date.today().isoformat()
    return BenchResult(
        today,
        machine(request.config.device, request.threads),
        versions(),
        request,
        schedule.recompute_steps,
        rounds,
        lines,
        failed,
    )


def _line(
    name: str, prepared: float, times: list[dict[str, Any]], facts: dict[str, Any], schedule: Schedule
) -> BenchLine:
    first, *timed = [each["steps"] for each in times]
    recomputed = facts.get("recompute_steps", schedule.recompute_steps)
    if name in UNCACHED:
        recomputed = range(schedule.num_steps)
    cached = [step for step in range(schedule.num_steps) if step not in recomputed]
    recompute = statistics.median(each[step] for each in timed for step in recomputed[1:] or recomputed)
    ideal = len(recomputed) * recompute
    if alone := times[-1]["alone"]:
        medians = {key: statistics.median(value for each in times[1:] for value in each["alone"][key]) for key in alone}
        ideal = len(recomputed) * medians["recompute"] + medians.get("prologue", 0.0)
    totals = [sum(each) for each in timed]
    known = ("graphs", "graph_breaks", "recompiles", "held_bytes", "peak_bytes")
    return BenchLine(
        name=name,
        loop=statistics.median(totals),
        spread=(min(totals), max(totals)),
        recompute_step=recompute,
        cached_step=statistics.median(each[step] for each in timed for step in cached) if cached else None,
        prepare_seconds=prepared,
        first_loop=sum(first),
        ideal=ideal,
        disk_bytes=facts.get("disk_bytes"),
        more={key: value for key, value in facts.items() if key not in (*known, "disk_bytes")},
        **{key: facts[key] for key in known},
    )
