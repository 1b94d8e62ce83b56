"""What the stages of gpu.py do that no other command does: one of them a call, in a process of its own.

python benchmarks/gpu_workers.py refit --model flux-1b
"""

import copy
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch

import recache_compile as rc
from recache_compile.bench.process import held
from recache_compile.bench.subjects import OURS, available
from recache_compile.bench.workload import BenchRequest, Workload, make_workload, peers_schedule
from recache_compile.compiler.compiled import Compiled
from recache_compile.config import CompileConfig
from recache_compile.evaluation.measure import seconds
from recache_compile.ir.forecasters import Taylor

ROOT = Path(__file__).parents[1]
PEERS = (OURS, "diffusers TaylorSeer lite + torch.compile", "cache-dit + torch.compile", "torch.compile")
MOST = {"flux-12b": 2}
"""How many of the peers are held at once, where a GPU of 80 GB has no room for all."""
SIZES = {"flux-1b": (4, 8, 16), "flux-3b": (4, 10, 24), "flux-12b": (19, 38, 24)}
"""Double blocks, single blocks and heads of 128 of FLUX-shaped models."""


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
    other = copy.deepcopy(workload.module)  # the weights of the model itself are those that are replaced
    state = {name: weight * 1.01 for name, weight in other.state_dict().items()}
    other.load_state_dict(state)
    before = compiled.dispatcher(setting.request.budget)(step=0, **workload.at(0))[0]
    taken = seconds(lambda: compiled.refit(state))
    ours = compiled.dispatcher(setting.request.budget)(step=0, **workload.at(0))[0]
    theirs = other(**workload.at(0), return_dict=False)[0]
    count = sum(weight.numel() for weight in compiled.weights.values())
    return {
        "seconds": taken,
        "seconds_per_billion": taken / count * 1e9,
        "error": float((ours - theirs).abs().max() / theirs.abs().max()),
        "change": float((ours - before).abs().max() / before.abs().max()),
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
        bench = (
            sys.executable,
            "-m",
            "recache_compile.cli.app",
            "bench",
            str(flux_file(model, Path(folder))),
            "--json",
        )
        command = (*bench, *options)
        return subprocess.run(command, cwd=ROOT, check=False).returncode


@click.command()
@click.argument("worker", type=click.Choice([*WORKERS, "peers"]))
@click.option("--model", default="flux-1b", show_default=True)
@click.option("--runtime", default="inductor", show_default=True)
@click.option("--dtype", default="bfloat16", show_default=True)
@click.option("--steps", default=28, show_default=True)
@click.option("--budget", default=7, show_default=True)
@torch.no_grad()
def main(worker: str, model: str, runtime: str, dtype: str, steps: int, budget: int) -> None:
    """Print one JSON object."""
    if worker == "peers":
        sys.exit(peers(model))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = CompileConfig(num_steps=steps, anchors=2, runtime=runtime, dtype=dtype, device=device)
    with tempfile.TemporaryDirectory() as folder:
        name = str(flux_file(model, Path(folder))) if model in SIZES else model
        found = WORKERS[worker](Setting(BenchRequest(name, budget, config)))
    facts = {"model": model, "steps": steps, "budget": budget, "runtime": runtime, "dtype": dtype}
    click.echo(json.dumps({**facts, **found}))


if __name__ == "__main__":
    main()
