"""Everything that needs a GPU, in one command: the stages that tell most come first.

    python benchmarks/gpu.py --list
    python benchmarks/gpu.py --output results/        every stage that has no result there yet
    python benchmarks/gpu.py --only loop,refit        some of them
    python benchmarks/gpu.py --dry-run                tiny sizes, on the CPU

For a machine that is there for half an hour: each stage is a process of its own with a time
limit, its result is a JSON file as soon as it ends, and what was broken off goes on where it
was.  Where packages cannot be downloaded, `--wheels FOLDER` installs those that lie there.
"""

import datetime
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.table import Table

import recache_compile as rc
from recache_compile.bench.process import held
from recache_compile.bench.subjects import OURS, available
from recache_compile.bench.workload import BenchRequest, Workload, make_workload, peers_schedule
from recache_compile.compiler.compiled import Compiled
from recache_compile.config import CompileConfig
from recache_compile.evaluation.measure import seconds
from recache_compile.ir.forecasters import Taylor
from recache_compile.support.files import writing
from recache_compile.support.machine import machine, versions

ROOT = Path(__file__).parents[1]
LOG = Console(stderr=True, highlight=False)
PYTHON = (sys.executable,)
PEERS = (OURS, "diffusers TaylorSeer lite + torch.compile", "cache-dit + torch.compile", "torch.compile")
MOST = {"flux-12b": 2}
"""How many of the peers are held at once, where a GPU of 80 GB has no room for all."""
SIZES = {"flux-1b": (4, 8, 16), "flux-3b": (4, 10, 24), "flux-12b": (19, 38, 24)}
"""Double blocks, single blocks and heads of 128 of FLUX-shaped models."""


@dataclass(frozen=True, slots=True)
class Stage:
    """One thing that is looked at.

    Args:
        name: of the result's file.
        tells: what it shows.
        command: prints a JSON object as its last line, or nothing of the kind.
        tiny: the same at a size for the CPU; empty: it has none.
        limit: seconds after which it is ended.
    """

    name: str
    tells: str
    command: tuple[str, ...]
    tiny: tuple[str, ...]
    limit: int = 300


def _bench(model: str, *options: str) -> tuple[str, ...]:
    return (*PYTHON, "-m", "recache_compile.cli.app", "bench", model, "--json", *options)


def _loop(*options: str) -> tuple[str, ...]:
    return (*PYTHON, "benchmarks/loop.py", "--json=/dev/stdout", *options)


def _worker(name: str, *options: str) -> tuple[str, ...]:
    return (*PYTHON, "benchmarks/gpu.py", "--worker", name, *options)


def _peers(name: str) -> tuple[str, ...]:
    return _worker("peers", "--model", name)


WIDE = ("--blocks=4,8", "--width=2048", "--tokens=4096", "--text-tokens=512", "--steps=28", "--budget=7", "--rounds=5")
SMALL = (
    "--no-jit",
    "--blocks=1,1",
    "--width=64",
    "--tokens=16",
    "--text-tokens=4",
    "--steps=6",
    "--budget=2",
    "--rounds=1",
)
TINY_BENCH = _bench(
    "flux-small", *("--steps", "6", "--budget", "3", "--rounds", "1", "--only", f"eager,{OURS}", "--runtime", "eager")
)
TINY = ("--model", "flux-small", "--runtime", "eager", "--dtype", "float32", "--steps", "4", "--budget", "2")

STAGES = (
    Stage(
        "tests",
        "that results equal those of the CPU, and that the loop never waits",
        (*PYTHON, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"),
        (*PYTHON, "-m", "pytest", "-q", "tests/test_gpu.py", "-p", "no:cacheprovider"),
    ),
    Stage(
        "loop",
        "our loop over its ideal, float32, with and without CUDA graphs",
        _loop("--device=cuda", *WIDE, "--runtimes=inductor,inductor+graphs"),
        _loop("--device=cpu", *SMALL, "--runtimes=eager"),
    ),
    Stage(
        "loop-bfloat16",
        "the same in bfloat16",
        _loop("--device=cuda", "--dtype=bfloat16", *WIDE, "--runtimes=inductor,inductor+graphs,eager"),
        _loop("--device=cpu", "--dtype=bfloat16", *SMALL, "--runtimes=eager"),
    ),
    Stage("flux-1b", "a FLUX-shaped model of 1.1 B parameters beside the peers, T = 28, k = 7", _peers("flux-1b"), ()),
    Stage("flux-3b", "one of 2.8 B", _peers("flux-3b"), ()),
    Stage("flux-12b", "FLUX.1-dev's own size", _peers("flux-12b"), TINY_BENCH, 600),
    Stage(
        "guidance",
        "Wan2.1-1.3B with guidance, two branches a step",
        _worker("guidance", "--model", "wan2.1-1.3b"),
        _worker("guidance", *TINY),
    ),
    Stage("memory", "bytes that are held, and at most, over the weights", _worker("memory"), _worker("memory", *TINY)),
    Stage(
        "offload",
        "the prologue's own weights in the host's memory",
        _worker("offload"),
        _worker("offload", *TINY),
    ),
    Stage("refit", "new weights in place, and the step after", _worker("refit"), _worker("refit", *TINY)),
    Stage(
        "onnxruntime",
        "onnxruntime-gpu on PyTorch's stream",
        _loop("--device=cuda", *WIDE, "--runtimes=onnxruntime"),
        _loop("--device=cpu", *SMALL, "--runtimes=onnxruntime"),
    ),
)


# what stages do that no other command does


@dataclass(frozen=True, slots=True)
class Setting:
    """A model, where it runs, and its loop.

    Args:
        request: as of `recache-compile bench`.
    """

    request: BenchRequest

    def build(self) -> tuple[Workload, Compiled]:
        """The model and its engines, on the schedule that `recache-compile bench` gives to all."""
        request = self.request
        workload = make_workload(request)
        engines = rc.build_engines(workload.module, [workload.example], request.config)
        schedule, _, _ = peers_schedule(request.num_steps, request.budget)
        return workload, engines.with_plans({request.budget: schedule}, Taylor(request.order))

    def loop(self, run: Callable[..., Any], workload: Workload, branches: Sequence[str] = ("",)) -> float:
        """Seconds of one generation."""

        def generation() -> None:
            for step in range(self.request.num_steps):
                for branch in branches:
                    run(step, branch, workload.at(step))

        return seconds(generation)

    def median_of(self, compiled: Compiled, workload: Workload) -> float:
        """Seconds of one generation, the median of those after the first."""
        run = compiled.dispatcher(self.request.budget)
        taken = [self.loop(lambda step, branch, inputs: run(step=step, **inputs), workload) for _ in range(4)]
        return statistics.median(taken[1:])


def guidance(setting: Setting) -> dict[str, Any]:
    """Whole loops of two branches, uncached and ours."""
    workload, compiled = setting.build()
    run = compiled.dispatcher(setting.request.budget)
    loops: dict[str, Callable[..., Any]] = {
        "eager": lambda step, branch, inputs: workload.module(**inputs, return_dict=False),
        "ours": lambda step, branch, inputs: run(step=step, branch=branch, **inputs),
    }
    taken = {
        name: statistics.median([setting.loop(call, workload, ("cond", "uncond")) for _ in range(3)][1:])
        for name, call in loops.items()
    }
    return {"seconds": taken, "speed": taken["eager"] / taken["ours"]}


def memory(setting: Setting) -> dict[str, Any]:
    """What building and one generation hold."""
    device = setting.request.config.device
    before = held(device)
    workload, compiled = setting.build()
    built = held(device) - before
    run = compiled.dispatcher(setting.request.budget)
    setting.loop(lambda step, branch, inputs: run(step=step, **inputs), workload)
    weights = sum(weight.nbytes for weight in compiled.weights.values())
    peak = torch.cuda.max_memory_allocated() if device.startswith("cuda") else None
    return {
        "weights": weights,
        "held_after_building": built,
        "held_after_a_generation": held(device) - before,
        "peak": peak,
    }


def offload(setting: Setting) -> dict[str, Any]:
    """A generation with and without the prologue's weights on the device."""
    workload, compiled = setting.build()
    device, found = setting.request.config.device, {}
    with tempfile.TemporaryDirectory() as folder:
        compiled.save(Path(folder) / "bundle")
        del compiled
        for name, away in (("here", False), ("offloaded", True)):
            before = held(device)
            loaded = rc.load(Path(folder) / "bundle", device=device, offload_prologue=away)
            taken = setting.median_of(loaded, workload)
            found[name] = {"seconds": taken, "held": held(device) - before}
            del loaded
    return found


def refit(setting: Setting) -> dict[str, Any]:
    """Seconds a billion parameters, and that the next step equals the model."""
    workload, compiled = setting.build()
    state = {name: weight * 1.01 for name, weight in workload.module.state_dict().items()}
    taken = seconds(lambda: compiled.refit(state))
    ours = compiled.dispatcher(setting.request.budget)(step=0, **workload.at(0))[0]
    theirs = workload.module(**workload.at(0), return_dict=False)[0]
    count = sum(weight.numel() for weight in compiled.weights.values())
    return {
        "seconds": taken,
        "seconds_per_billion": taken / count * 1e9,
        "error": float((ours - theirs).abs().max() / theirs.abs().max()),
    }


WORKERS: Mapping[str, Callable[[Setting], dict[str, Any]]] = {
    "guidance": guidance,
    "memory": memory,
    "offload": offload,
    "refit": refit,
}


def flux_file(name: str, folder: Path) -> Path:
    """A description of a FLUX-shaped model, of FLUX.1-dev's own by other numbers of blocks and heads."""
    known = json.loads((ROOT / "recache_compile" / "models" / "specs" / "flux.1-dev.json").read_text(encoding="utf-8"))
    double, single, heads = SIZES[name]
    known["config"] |= {"num_layers": double, "num_single_layers": single, "num_attention_heads": heads}
    file = folder / f"{name}.json"
    file.write_text(json.dumps(known | {"name": name}), encoding="utf-8")
    return file


def peers(model: str) -> int:
    """Run `recache-compile bench` on a FLUX-shaped model; its exit status."""
    with tempfile.TemporaryDirectory() as folder:
        here = [name for name in PEERS if name in available()][: MOST.get(model)]
        options = ("--steps", "28", "--budget", "7", "--rounds", "5", "--dtype", "bfloat16", "--only", ",".join(here))
        command = _bench(str(flux_file(model, Path(folder))), *options)
        return subprocess.run(command, cwd=ROOT, check=False).returncode


# the stages, one after another


def run_stage(stage: Stage, command: Sequence[str]) -> dict[str, Any]:
    """What a stage gave."""
    begin = time.monotonic()
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=stage.limit, check=False)
        code, out, err = done.returncode, done.stdout, done.stderr
    except subprocess.TimeoutExpired as error:
        code, out, err = None, _text(error.stdout), _text(error.stderr)
    return {
        "stage": stage.name,
        "tells": stage.tells,
        "date": datetime.date.today().isoformat(),
        "machine": machine("cuda" if torch.cuda.is_available() else "cpu"),
        "versions": versions(),
        "command": ["python" if part == sys.executable else part for part in command],
        "exit": code,
        "seconds": round(time.monotonic() - begin, 1),
        "result": _last_json(out),
        "output": "" if _last_json(out) else out[-4000:],
        "errors": err[-4000:] if code else "",
    }


def _text(given: bytes | str | None) -> str:
    return given.decode(errors="replace") if isinstance(given, bytes) else given or ""


def _last_json(out: str) -> Any:
    """The JSON object that a command printed last; None where it printed none."""
    begin = out.rfind("\n{") + 1
    try:
        return json.loads(out[begin:])
    except ValueError:
        return None


def chosen_stages(only: str | None) -> list[Stage]:
    """Some of the stages, in their order.

    Raises:
        click.ClickException: one is unknown.
    """
    names = [stage.name for stage in STAGES] if only is None else [part.strip() for part in only.split(",")]
    if unknown := sorted(set(names) - {stage.name for stage in STAGES}):
        raise click.ClickException(f"--only {unknown[0]}: no such stage; see --list")
    return [stage for stage in STAGES if stage.name in names]


def show_stages() -> None:
    """Print what there is."""
    table = Table("stage", "tells", "limit s")
    for stage in STAGES:
        table.add_row(stage.name, stage.tells, str(stage.limit))
    Console().print(table)


def install(wheels: Path) -> None:
    """Install what lies in a folder, and nothing else.

    Raises:
        click.ClickException: it cannot be installed.
    """
    files = sorted(map(str, wheels.glob("*.whl")))
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", *files]
    if not files or subprocess.run(command, check=False).returncode:
        raise click.ClickException(f"--wheels {wheels}: no wheels there, or pip could not install them")


@click.command()
@click.option("--output", type=click.Path(path_type=Path, file_okay=False), default="gpu-results", show_default=True)
@click.option("--only", help="Names of stages, separated by commas.")
@click.option("--list", "listing", is_flag=True, help="Say which stages there are.")
@click.option("--again", is_flag=True, help="Also those that have a result.")
@click.option("--dry-run", is_flag=True, help="Tiny sizes on the CPU.")
@click.option("--wheels", type=click.Path(path_type=Path, exists=True, file_okay=False), help="Install these first.")
@click.option("--worker", type=click.Choice([*WORKERS, "peers"]), hidden=True)
@click.option("--model", default="flux-1b", hidden=True)
@click.option("--runtime", default="inductor", hidden=True)
@click.option("--dtype", default="bfloat16", hidden=True)
@click.option("--steps", default=28, hidden=True)
@click.option("--budget", default=7, hidden=True)
@torch.no_grad()
def main(
    output: Path,
    only: str | None,
    listing: bool,
    again: bool,
    dry_run: bool,
    wheels: Path | None,
    worker: str | None,
    model: str,
    **loop: Any,
) -> None:
    """Run the stages; see the file's head."""
    if worker == "peers":
        sys.exit(peers(model))
    if worker:
        work(worker, model, **loop)
    elif listing:
        show_stages()
    else:
        if wheels:
            install(wheels)
        run_stages(chosen_stages(only), output, again, dry_run)


def work(worker: str, model: str, runtime: str, dtype: str, steps: int, budget: int) -> None:
    """One stage's own process; prints its result."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = CompileConfig(num_steps=steps, anchors=2, runtime=runtime, dtype=dtype, device=device)
    with tempfile.TemporaryDirectory() as folder:
        name = str(flux_file(model, Path(folder))) if model in SIZES else model
        found = WORKERS[worker](Setting(BenchRequest(name, budget, config)))
    click.echo(json.dumps({"model": model, **loop_facts(config, budget), **found}))


def loop_facts(config: CompileConfig, budget: int) -> dict[str, Any]:
    """What a result is of."""
    return {"steps": config.num_steps, "budget": budget, "runtime": config.runtime, "dtype": config.dtype}


def run_stages(stages: Sequence[Stage], output: Path, again: bool, dry_run: bool) -> None:
    """Run what has no result yet, one file each.

    Raises:
        click.ClickException: a stage failed; the others have run.
    """
    output.mkdir(parents=True, exist_ok=True)
    failed = []
    for stage in stages:
        command, file = stage.tiny if dry_run else stage.command, output / f"{stage.name}.json"
        if not command or (file.exists() and not again and json.loads(file.read_text(encoding="utf-8"))["exit"] == 0):
            continue
        LOG.print(f"{stage.name}: {stage.tells}")
        found = run_stage(stage, command)
        with writing(file) as partial:
            partial.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        LOG.print(f"  exit {found['exit']} after {found['seconds']} s; {file}")
        failed += [] if found["exit"] == 0 else [stage.name]
    if failed:
        raise click.ClickException(f"{', '.join(failed)} failed; see their files in {output}")


if __name__ == "__main__":
    main()
