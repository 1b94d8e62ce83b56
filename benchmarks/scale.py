"""How cost grows with the model: seconds of every stage of compiling, memory, disk, one generation.

    python benchmarks/scale.py --models 4,12,24,57,wan-1.3b

A number stands for a FLUX-shaped model of that many blocks, two of three single; wan-1.3b is Wan2.1-1.3B
at its real size, for 5 frames of 256 x 256.  Weights are random.  Every model has a process and a cache
of Inductor of its own.  Memory is resident memory of that process: C++ compilers are not counted.
"""

import contextlib
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import click
import torch
from apart import answer_of, conditions, write
from rich.console import Console
from rich.table import Table

import recache_compile as rc
from recache_compile.artifact.specs import FOLDER
from recache_compile.bench.process import held
from recache_compile.bench.subjects import folder_bytes, renew
from recache_compile.bench.workload import BenchRequest, Workload, make_workload
from recache_compile.compiler import captures
from recache_compile.compiler.compiled import Compiled
from recache_compile.compiler.side_by_side import Helpers
from recache_compile.config import CompileConfig
from recache_compile.evaluation.measure import seconds
from recache_compile.ir.forecasters import Taylor
from recache_compile.ir.schedule import Schedule
from recache_compile.runtimes.registry import known_runtime
from recache_compile.support.disk_cache import limited_to
from recache_compile.support.log import told

STEPS, BUDGET = 4, 2
SCHEDULE = Schedule((0, 2), STEPS)
WAN = "wan-1.3b"
WAN_LATENTS = (1, 16, 2, 32, 32)
"""Of 5 frames of 256 x 256."""

LOG = Console(stderr=True, highlight=False)


def spec_of(name: str, width: int) -> dict[str, Any]:
    """What is measured under a name, as a spec of the package."""
    if name == WAN:
        spec = json.loads((FOLDER / "wan2.1-1.3b.json").read_text(encoding="utf-8"))
        spec["inputs"]["hidden_states"]["shape"] = WAN_LATENTS
        return spec  # type: ignore[no-any-return]
    spec = json.loads((FOLDER / "small" / "flux-small.json").read_text(encoding="utf-8"))
    double, single = split_blocks(int(name))
    spec["config"] |= {
        "num_layers": double,
        "num_single_layers": single,
        "num_attention_heads": width // spec["config"]["attention_head_dim"],
        "joint_attention_dim": width,
        "pooled_projection_dim": width,
    }
    for text in ("encoder_hidden_states", "pooled_projections"):
        spec["inputs"][text]["shape"][-1] = width
    return spec  # type: ignore[no-any-return]


def split_blocks(blocks: int) -> tuple[int, int]:
    """Double and single blocks in FLUX's ratio 19 : 38, one of each at least."""
    double = max(1, round(blocks / 3))
    return double, blocks - double


def build_workload(name: str, width: int, runtime: str) -> tuple[Workload, CompileConfig]:
    """A model with random weights and its call, and how it is compiled."""
    spec = spec_of(name, width)
    config = CompileConfig(num_steps=STEPS, anchors=2, runtime=runtime, dtype=spec["dtype"])
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "spec.json"
        file.write_text(json.dumps(spec), encoding="utf-8")
        return make_workload(BenchRequest(str(file), BUDGET, config)), config


@contextlib.contextmanager
def timed_stages(runtime: str) -> Iterator[dict[str, float]]:
    """Seconds of each stage of the compiler in this block, by name; "lower NAME" for each program, one after another."""
    taken: dict[str, float] = {}

    def timed(work: Callable[..., Any], name_of: Callable[..., str]) -> Callable[..., Any]:
        def call(*given: Any) -> Any:
            begin = time.perf_counter()
            try:
                return work(*given)
            finally:
                name = name_of(*given)
                taken[name] = taken.get(name, 0) + time.perf_counter() - begin

        return call

    stages = {
        "capture": (captures.Capturing, "_captured"),
        "cache points": (captures, "annotate"),
        "split": (captures, "specialise"),
        "count": (captures, "count_macs"),
    }
    with contextlib.ExitStack() as stack:
        for stage, (place, function) in stages.items():
            replaced = timed(getattr(place, function), lambda *_, stage=stage: stage)
            stack.enter_context(mock.patch.object(place, function, replaced))
        backend = type(known_runtime(runtime))
        replaced = timed(backend.lower, lambda _, program, *__: f"lower {program.name}")
        stack.enter_context(mock.patch.object(backend, "lower", replaced))
        stack.enter_context(mock.patch.object(Helpers, "start", lambda _: None))
        stack.enter_context(limited_to(0))
        yield taken


def reset_peak() -> None:
    """Let the peak of this process begin at what it holds now."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak() -> int:
    """The most bytes that this process held since `reset_peak`."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def measure(name: str, width: int, runtime: str, rounds: int) -> dict[str, Any]:
    """One model, in this process."""
    from diffusers.models import transformers  # noqa: F401

    libraries = held("cpu")
    workload, config = build_workload(name, width, runtime)
    weights = sum(weight.nbytes for weight in workload.module.parameters())
    reset_peak()
    begin = time.perf_counter()
    with told(LOG.print), timed_stages(runtime) as stages:
        engines = rc.build_engines(workload.module, [workload.example], config)
    stages["rest"] = time.perf_counter() - begin - sum(stages.values())
    most = peak()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "artifact"
        LOG.print("saving, loading")
        saving = seconds(lambda: engines.with_plans({BUDGET: SCHEDULE}, Taylor(1)).save(folder))
        begin = time.perf_counter()
        loaded = rc.load(folder)
        return {
            "blocks": None if name == WAN else sum(split_blocks(int(name))),
            "nodes": {program: each.num_calls for program, each in loaded.variants[0].programs.items()},
            "stages": {**stages, "save": saving, "load": time.perf_counter() - begin},
            "weight_bytes": weights,
            "peak_bytes": most,
            "peak_over_weights": (most - libraries) / weights,
            "artifact_bytes": folder_bytes(folder),
            "generation": generations(loaded, workload, rounds),
        }


def generations(compiled: Compiled, workload: Workload, rounds: int) -> dict[str, float]:
    """Median seconds of a generation, ours and the eager model's in turn; the first of each is not counted."""
    run, module = compiled.dispatcher(BUDGET), workload.module

    def ours() -> None:
        run.reset()
        for step in range(STEPS):
            run(step=step, **workload.at(step))

    def eager() -> None:
        for step in range(STEPS):
            module(**workload.at(step), return_dict=False)

    taken: dict[str, list[float]] = {"ours": [], "eager": []}
    for number in range(rounds + 1):
        LOG.print(f"generation {number} of {rounds}")
        renew(workload)  # every generation pays for its prologue
        for who, generation in (("ours", ours), ("eager", eager)):
            taken[who].append(seconds(generation))
    return {who: statistics.median(times[1:]) for who, times in taken.items()}


def measure_in_own_process(name: str, width: int, runtime: str, rounds: int) -> dict[str, Any]:
    """The same in a process whose memory and cache are those of this model alone."""
    with tempfile.TemporaryDirectory() as cache:
        options = ["--width", str(width), "--runtime", runtime, "--rounds", str(rounds)]
        return answer_of(  # type: ignore[no-any-return]
            __file__, ["--in-this-process", name, *options], {"TORCHINDUCTOR_CACHE_DIR": cache}
        )


def show(models: dict[str, dict[str, Any]]) -> None:
    """Print the table, one column for each model."""
    table = Table("", *(f"{name} blocks" if each["blocks"] else name for name, each in models.items()))
    for stage in dict.fromkeys(stage for each in models.values() for stage in each["stages"]):
        found = (each["stages"].get(stage) for each in models.values())
        table.add_row(f"{stage}, s", *("" if taken is None else f"{taken:.2f}" for taken in found))
    rows: dict[str, Callable[[dict[str, Any]], str]] = {
        "weights, MB": lambda each: f"{each['weight_bytes'] / 1e6:.0f}",
        "peak memory, MB": lambda each: f"{each['peak_bytes'] / 1e6:.0f}",
        "beyond libraries / weights": lambda each: f"{each['peak_over_weights']:.2f}",
        "disk, MB": lambda each: f"{each['artifact_bytes'] / 1e6:.1f}",
        "generation, s": lambda each: f"{each['generation']['ours']:.3f}",
        "uncached eager, s": lambda each: f"{each['generation']['eager']:.3f}",
    }
    for title, text in rows.items():
        table.add_row(title, *map(text, models.values()))
    Console().print(table)


def check_names(models: str) -> list[str]:
    """The names, refused where one is not known."""
    names = models.split(",")
    for name in names:
        if name != WAN and not (name.isdecimal() and int(name) >= 2):
            raise click.BadParameter(f"{name!r}: expected a number of blocks from 2, or {WAN}", param_hint="--models")
    return names


@click.command()
@click.option("--models", default=f"4,12,24,57,{WAN}", show_default=True, help="Numbers of FLUX blocks, and Wan.")
@click.option("--width", default=256, show_default=True, help="Of the FLUX shapes, a multiple of 64.")
@click.option("--runtime", default="inductor", show_default=True)
@click.option("--rounds", default=3, show_default=True, help="Timed generations of each kind.")
@click.option("--json", "json_file", type=click.Path(path_type=Path, dir_okay=False), help="Write the numbers here.")
@click.option("--in-this-process", hidden=True)
@torch.no_grad()
def main(
    models: str, width: int, runtime: str, rounds: int, json_file: Path | None, in_this_process: str | None
) -> None:
    """Measure; see the file's head."""
    if in_this_process is not None:
        click.echo(json.dumps(measure(in_this_process, width, runtime, rounds)))
        return
    found: dict[str, Any] = {**conditions(), "runtime": runtime, "width": width, "rounds": rounds, "models": {}}
    for name in check_names(models):
        LOG.rule(name)
        found["models"][name] = measure_in_own_process(name, width, runtime, rounds)
        write(found, json_file)
    show(found["models"])


if __name__ == "__main__":
    main()
