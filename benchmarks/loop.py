"""One denoising loop of a FLUX-shaped random model: eager, torch.compile and ours on every runtime, in one run.

    python benchmarks/loop.py --runtimes inductor,onnxruntime,eager

On a GPU, "inductor+graphs" replays CUDA graphs.  Rounds are interleaved, medians count.
The ideal is what the recompute steps and the prologue cost when their engines are called
on their own: everything above it is overhead.  Memory is that of a process of its own,
after one generation, beyond what it held before it loaded anything.
"""

import contextlib
import datetime
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import torch
from diffusers import FluxTransformer2DModel
from rich.console import Console
from rich.table import Table

import recache_compile as rc
from recache_compile.bench.process import held
from recache_compile.bench.subjects import folder_bytes, lone_calls
from recache_compile.compiler.compiled import Compiled
from recache_compile.evaluation.measure import seconds
from recache_compile.runtimes.registry import get_runtime
from recache_compile.support.disk_cache import limited_to
from recache_compile.support.log import told
from recache_compile.support.machine import machine

Call = Callable[[int], Any]
LOG = Console(stderr=True, highlight=False)


@dataclass(frozen=True, slots=True)
class Sizes:
    """What is measured.

    Args:
        blocks: double and single blocks.
        width: of the hidden states.
        tokens: of the image, a square number.
        text_tokens: of the prompt.
        steps: length T of the loop.
        budget: recompute steps k.
        device: where it runs.
        dtype: of weights and latents.
    """

    blocks: tuple[int, int]
    width: int
    tokens: int
    text_tokens: int
    steps: int
    budget: int
    device: str
    dtype: str = "float32"


def build_model(sizes: Sizes) -> FluxTransformer2DModel:
    """A FLUX transformer with random weights."""
    torch.manual_seed(0)
    head = 64
    model = FluxTransformer2DModel(
        patch_size=1,
        in_channels=64,
        num_layers=sizes.blocks[0],
        num_single_layers=sizes.blocks[1],
        attention_head_dim=head,
        num_attention_heads=sizes.width // head,
        joint_attention_dim=sizes.width,
        pooled_projection_dim=sizes.width,
        guidance_embeds=True,
        axes_dims_rope=(16, 24, 24),
    )
    return model.eval().to(sizes.device, getattr(torch, sizes.dtype))


def build_inputs(sizes: Sizes) -> dict[str, torch.Tensor]:
    """Arguments of one call, batch 1."""
    side = torch.arange(round(sizes.tokens**0.5), dtype=torch.float32)
    rows, columns = torch.meshgrid(side, side, indexing="ij")
    inputs = {
        "hidden_states": torch.randn(1, len(side) ** 2, 64),
        "encoder_hidden_states": torch.randn(1, sizes.text_tokens, sizes.width),
        "pooled_projections": torch.randn(1, sizes.width),
        "timestep": torch.ones(1),
        "img_ids": torch.stack([torch.zeros_like(rows), rows, columns], -1).reshape(-1, 3),
        "txt_ids": torch.zeros(sizes.text_tokens, 3),
        "guidance": torch.full((1,), 3.5),
    }
    kept = ("guidance", "img_ids", "txt_ids")  # as the pipeline passes them
    dtypes = {name: value.dtype if name in kept else getattr(torch, sizes.dtype) for name, value in inputs.items()}
    return {name: value.to(sizes.device, dtypes[name]) for name, value in inputs.items()}


def timetable(sizes: Sizes) -> torch.Tensor:
    """Timesteps (T, 1)."""
    column = torch.linspace(1, 1 / sizes.steps, sizes.steps, device=sizes.device)[:, None]
    return column.to(getattr(torch, sizes.dtype))


def build_engines(
    model: FluxTransformer2DModel, inputs: dict[str, torch.Tensor], sizes: Sizes, runtimes: Sequence[str], folder: Path
) -> tuple[dict[str, Compiled], dict[str, float]]:
    """The model compiled for every runtime and loaded from its artifact, and the seconds that building took."""
    compiled = rc.compile(
        model,
        inputs,
        budgets=(sizes.budget,),
        num_steps=sizes.steps,
        runtime="eager",
        timesteps={"timestep": timetable(sizes)},
    )
    compiled.save(folder / "eager")
    engines, taken = {}, {}
    for name in runtimes:
        runtime, _, graphs = name.partition("+")
        begin = time.perf_counter()
        with told(LOG.print), limited_to(0):
            rc.rebuild(folder / "eager", runtime).save(folder / name)
        taken[name] = time.perf_counter() - begin
        engines[name] = rc.load(folder / name, cuda_graphs=bool(graphs))
    return engines, taken


def run_rounds(
    calls: dict[str, Call], engines: dict[str, Compiled], inputs: dict[str, torch.Tensor], sizes: Sizes, rounds: int
) -> tuple[dict[str, list[list[float]]], dict[tuple[str, str], list[float]]]:
    """Times of every step of every generation, and of the lone engines."""
    times: dict[str, list[list[float]]] = {name: [] for name in calls}
    alone = {
        (name, program): call
        for name, compiled in engines.items()
        for program, call in lone_calls(compiled, sizes.budget).items()
    }
    lone: dict[tuple[str, str], list[float]] = {place: [] for place in alone}
    for number in range(-1, rounds):  # the first round warms up
        LOG.print(f"round {number + 1} of {rounds}")
        for name, call in calls.items():
            inputs["pooled_projections"].add_(0.01)  # new conditioning: every generation pays its prologue
            taken = [seconds(lambda step=step, call=call: call(step)) for step in range(sizes.steps)]
            if number >= 0:
                times[name].append(taken)
        for place, call in alone.items():
            taken = [seconds(call) for _ in range(sizes.budget)]
            if number >= 0:
                lone[place].extend(taken)
    return times, lone


def facts_of(
    compiled: Compiled, taken: list[list[float]], lone: dict[str, list[float]], folder: Path, sizes: Sizes
) -> dict[str, Any]:
    """What one runtime gave."""
    schedule = compiled.schedules[sizes.budget].recompute_steps
    others = [step for step in range(sizes.steps) if step not in schedule]
    recompute = statistics.median(each[step] for each in taken for step in schedule[1:])
    cached = statistics.median(each[step] for each in taken for step in others)
    ideal = sizes.budget * statistics.median(lone["recompute"]) + statistics.median(lone["prologue"])
    weights = sum(weight.nbytes for weight in compiled.weights.values())
    files = folder_bytes(folder)
    return {
        "recompute_step": recompute,
        "cached_step": cached,
        "prologue": statistics.median(lone["prologue"]),
        "generation_over_ideal": statistics.median(map(sum, taken)) / ideal,
        "weight_bytes": weights,
        "artifact_bytes": files,
        "artifact_over_weights": files / weights,
    }


def memory_in_own_process(what: str, sizes: Sizes) -> int:
    """Bytes that a process holds after a generation of `what`: an artifact's folder, or "model"."""
    command = [sys.executable, __file__, "--memory-of", what, "--sizes", json.dumps(asdict(sizes))]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def print_memory(what: str, sizes: Sizes) -> None:
    """The child process of `memory_in_own_process`."""
    inputs = build_inputs(sizes)
    torch.mm(torch.rand(64, 64, device=sizes.device), torch.rand(64, 64, device=sizes.device))
    from diffusers.models import transformers  # noqa: F401

    for runtime in ("onnxruntime", "tensorrt_rtx", "tensorrt"):  # libraries do not count
        with contextlib.suppress(rc.RecacheError):
            get_runtime(runtime, building=False)
    before = held(sizes.device)
    if what == "model":
        model = build_model(sizes)
        model(**inputs)
    else:
        run = rc.load(what, cuda_graphs=what.endswith("+graphs")).dispatcher(sizes.budget)
        for step, timestep in enumerate(timetable(sizes)):
            run(step=step, **{**inputs, "timestep": timestep})
    click.echo(held(sizes.device) - before)


def measure(sizes: Sizes, names: Sequence[str], rounds: int, jit: bool) -> dict[str, Any]:
    """Every runtime and the model itself, side by side.

    Args:
        sizes: of the model and the loop.
        names: of runtimes; "+graphs" after one replays CUDA graphs.
        rounds: timed generations of each.
        jit: whether `torch.compile` is among them.
    """
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        model, inputs, table = build_model(sizes), build_inputs(sizes), timetable(sizes)
        engines, built_in = build_engines(model, inputs, sizes, names, folder)

        def arguments(step: int) -> dict[str, torch.Tensor]:
            return {**inputs, "timestep": table[step]}

        calls: dict[str, Call] = {"model, eager": lambda step: model(**arguments(step), return_dict=False)}
        if jit:
            jitted = torch.compile(model)
            calls["model, torch.compile"] = lambda step: jitted(**arguments(step), return_dict=False)
        for name, compiled in engines.items():
            run = compiled.dispatcher(sizes.budget)
            calls[name] = lambda step, run=run: run(step=step, **arguments(step))  # type: ignore[misc]
        times, lone = run_rounds(calls, engines, inputs, sizes, rounds)
        totals = {name: statistics.median(map(sum, taken)) for name, taken in times.items()}
        memory = {name: memory_in_own_process(str(folder / name), sizes) for name in names}
        memory["model"] = memory_in_own_process("model", sizes)
        compiled = engines[names[0]]
        return {
            "machine": machine(sizes.device),
            "torch": torch.__version__,
            "date": datetime.date.today().isoformat(),
            "rounds": rounds,
            **asdict(sizes),
            "recompute_steps": compiled.schedules[sizes.budget].recompute_steps,
            "macs_reduction": compiled.cost(sizes.budget).macs_reduction,
            "nodes": {name: program.num_calls for name, program in compiled.variants[0].programs.items()},
            "seconds": totals,
            "spread": {name: [min(map(sum, taken)), max(map(sum, taken))] for name, taken in times.items()},
            "ratio_to_eager": {name: totals["model, eager"] / total for name, total in totals.items()},
            "held_bytes": memory,
            "runtimes": {
                name: {
                    "build_seconds": built_in[name],
                    **facts_of(
                        engines[name],
                        times[name],
                        {program: lone[name, program] for program in ("recompute", "prologue")},
                        folder / name,
                        sizes,
                    ),
                    "held_over_model": memory[name] / memory["model"],
                }
                for name in names
            },
        }


@click.command()
@click.option("--blocks", default="4,8", show_default=True, help="Double and single blocks.")
@click.option("--width", default=512, show_default=True)
@click.option("--tokens", default=256, show_default=True, help="Image tokens, a square number.")
@click.option("--text-tokens", default=64, show_default=True)
@click.option("--steps", default=20, show_default=True)
@click.option("--budget", default=5, show_default=True)
@click.option("--rounds", default=7, show_default=True, help="Interleaved generations of each kind.")
@click.option("--runtimes", default="inductor,onnxruntime,eager", show_default=True)
@click.option("--device", default="cuda" if torch.cuda.is_available() else "cpu", show_default=True)
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), default="float32", show_default=True)
@click.option("--jit/--no-jit", default=True, show_default=True, help="The model under torch.compile as well.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the numbers here too.")
@click.option("--memory-of", hidden=True)
@click.option("--sizes", "given", hidden=True)
@torch.no_grad()
def main(
    blocks: str,
    width: int,
    tokens: int,
    text_tokens: int,
    steps: int,
    budget: int,
    rounds: int,
    runtimes: str,
    device: str,
    dtype: str,
    jit: bool,
    json_file: Path | None,
    memory_of: str | None,
    given: str | None,
) -> None:
    """Measure; see the file's head."""
    if memory_of is not None and given is not None:
        print_memory(memory_of, Sizes(**json.loads(given)))
        return
    double, single = map(int, blocks.split(","))
    result = measure(
        Sizes((double, single), width, tokens, text_tokens, steps, budget, device, dtype),
        runtimes.split(","),
        rounds,
        jit,
    )
    show(result)
    if json_file:
        json_file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def show(result: dict[str, Any]) -> None:
    """Print the tables."""
    page = Console()
    title = f"{result['machine']}, torch {result['torch']}, T = {result['steps']}, k = {result['budget']}"
    loops = Table(title=title)
    for column in ("loop", "median s", "min to max s", "speed"):
        loops.add_column(column, justify="left" if column == "loop" else "right")
    for name, total in result["seconds"].items():
        low, high = result["spread"][name]
        loops.add_row(name, f"{total:.3f}", f"{low:.3f} to {high:.3f}", f"x {result['ratio_to_eager'][name]:.2f}")
    page.print(loops)
    columns = {
        "build_seconds": "build s",
        "recompute_step": "recompute step ms",
        "cached_step": "cached step ms",
        "prologue": "prologue ms",
        "generation_over_ideal": "generation / ideal",
        "artifact_over_weights": "disk / weights",
        "held_over_model": "memory / model",
    }
    each = Table("runtime", *columns.values(), title=f"multiply-accumulates / {result['macs_reduction']:.2f}")
    for name, facts in result["runtimes"].items():
        milli = ("recompute_step", "cached_step", "prologue")
        each.add_row(name, *(f"{facts[key] * 1e3:.2f}" if key in milli else f"{facts[key]:.3f}" for key in columns))
    page.print(each)


if __name__ == "__main__":
    main()
