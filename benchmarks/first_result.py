"""Seconds from nothing to the first result, and again with what the caches on disk hold.

    python benchmarks/first_result.py --json benchmarks/results/first-result.json

Each model has caches of its own, empty at first, and three tries: one in a new process; the same module with
other budgets and another policy in that process; the same in another new process.  Precompiled headers, which
torch keeps outside of any such cache, are there after the first compilation on a machine; `--without-headers`
lets the first model make them.
"""

import json
import os
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from apart import answer_of, conditions, write

STEPS = 50
TRIES = (("first", (5, 10, 15), "uniform"), ("another policy, same process", (7, 13), "front-loaded"))
AGAIN = "another process"
STAGES = {
    "capturing": "capture",
    "specialising": "split",
    "building the prologue": "split",
    "from the cache": "lower and load",
    "lowering": "lower and load",
    "choosing": "rest",
}
"""What the compiler says when a stage begins."""


class Stages:
    """Seconds of stages, each of which ends the one before."""

    def __init__(self) -> None:
        self.taken: dict[str, float] = {}
        self._name, self._since = "", time.perf_counter()

    def begin(self, name: str) -> None:
        """From now on another stage."""
        now = time.perf_counter()
        if self._name:
            self.taken[self._name] = self.taken.get(self._name, 0) + now - self._since
        self._name, self._since = name, now

    def tell(self, message: str) -> None:
        """The same, by what the compiler says."""
        stage = next((stage for begins, stage in STAGES.items() if message.startswith(begins)), None)
        if stage is not None:
            self.begin(stage)


def processor_seconds() -> float:
    """Of this process and of those that it has waited for."""
    uses = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(use.ru_utime + use.ru_stime for use in uses)


def measure(model: str, started: float, runtime: str, tries: int) -> list[dict[str, Any]]:
    """Every try in this process; the first begins when the process was started."""
    import torch

    import recache_compile as rc
    from recache_compile.bench.workload import BenchRequest, make_workload
    from recache_compile.config import CompileConfig
    from recache_compile.support.log import told

    torch.set_grad_enabled(False)
    before = {"start and imports": time.time() - started}
    workload = make_workload(BenchRequest(model, 5, CompileConfig(num_steps=STEPS)))
    before["model"] = time.time() - started - before["start and imports"]
    found = []
    for number, (name, budgets, policy) in enumerate(TRIES[:tries]):
        stages, used, load = Stages(), processor_seconds(), os.getloadavg()[0]
        stages.begin("rest")
        with told(stages.tell):
            compiled = rc.compile(
                workload.module,
                dict(workload.inputs),
                budgets=budgets,
                num_steps=STEPS,
                policy=policy,
                runtime=runtime,
                timesteps=workload.example.timesteps,
            )
        stages.begin("generation")
        run = compiled.dispatcher(budgets[0])
        for step in range(STEPS):
            run(step=step, **workload.at(step))
        stages.begin("")
        taken = (before if number == 0 else {}) | stages.taken
        compiling = sum(stages.taken.values())
        used = processor_seconds() - used
        found.append({"try": name, "stages": taken, "compile": compiling, "processor": used, "load": load})
    return found


@contextmanager
def own_caches(model: str, headers: bool) -> Iterator[Callable[[int, str], list[dict[str, Any]]]]:
    """Processes that share caches which are empty at first."""
    with tempfile.TemporaryDirectory() as place:
        environment = {"TORCHINDUCTOR_CACHE_DIR": f"{place}/inductor", "RECACHE_CACHE": f"{place}/recache"}
        if not headers:
            environment["TMPDIR"] = place  # torch keeps them there

        def run(tries: int, runtime: str) -> list[dict[str, Any]]:
            options = ["--runtime", runtime, "--in-this-process", model, str(time.time()), str(tries)]
            return answer_of(__file__, options, environment)  # type: ignore[no-any-return]

        yield run


@click.command()
@click.option("--models", default="flux-small,wan-small,sd3-small", show_default=True)
@click.option("--runtime", default="inductor", show_default=True)
@click.option("--without-headers", is_flag=True, help="Let every model precompile the headers of torch.")
@click.option("--json", "json_file", type=click.Path(path_type=Path, dir_okay=False), help="Write the numbers here.")
@click.option("--in-this-process", nargs=3, hidden=True)
def main(
    models: str,
    runtime: str,
    without_headers: bool,
    json_file: Path | None,
    in_this_process: tuple[str, str, str] | None,
) -> None:
    """Measure; see the file's head."""
    if in_this_process:
        model, started, tries = in_this_process
        click.echo(json.dumps(measure(model, float(started), runtime, int(tries))))
        return
    found: dict[str, Any] = {**conditions(), "runtime": runtime, "headers": not without_headers, "models": {}}
    for model in models.split(","):
        with own_caches(model, not without_headers) as run:
            tries = run(len(TRIES), runtime)
            tries += [{**each, "try": AGAIN} for each in run(1, runtime)]
        found["models"][model] = tries
        for each in tries:
            stages = ", ".join(f"{stage} {taken:.1f}" for stage, taken in each["stages"].items())
            click.echo(f"{model}, {each['try']}: compiled in {each['compile']:.1f} s ({stages})", err=True)
        write(found, json_file)


if __name__ == "__main__":
    main()
