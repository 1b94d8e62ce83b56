"""One denoising loop of a FLUX-shaped random model: eager, torch.compile and ours, in one run.

    python benchmarks/loop.py

Rounds are interleaved, medians count.  The ideal is what the recompute steps and the
prologue cost when they are called on their own: everything above it is overhead.
"""

import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
from diffusers import FluxTransformer2DModel
from rich.console import Console
from rich.table import Table

import recache_compile as rc
from recache_compile.measure import seconds
from recache_compile.program import Kind

Call = Callable[[int], Any]


def build_model(blocks: tuple[int, int], width: int, device: str) -> FluxTransformer2DModel:
    """A FLUX transformer with random weights."""
    torch.manual_seed(0)
    head = 64
    model = FluxTransformer2DModel(
        patch_size=1,
        in_channels=64,
        num_layers=blocks[0],
        num_single_layers=blocks[1],
        attention_head_dim=head,
        num_attention_heads=width // head,
        joint_attention_dim=width,
        pooled_projection_dim=width,
        guidance_embeds=True,
        axes_dims_rope=(16, 24, 24),
    )
    return model.eval().to(device)


def build_inputs(width: int, tokens: int, text_tokens: int, device: str) -> dict[str, torch.Tensor]:
    """Arguments of one call, batch 1."""
    side = torch.arange(round(tokens**0.5), dtype=torch.float32)
    rows, columns = torch.meshgrid(side, side, indexing="ij")
    inputs = {
        "hidden_states": torch.randn(1, len(side) ** 2, 64),
        "encoder_hidden_states": torch.randn(1, text_tokens, width),
        "pooled_projections": torch.randn(1, width),
        "timestep": torch.ones(1),
        "img_ids": torch.stack([torch.zeros_like(rows), rows, columns], -1).reshape(-1, 3),
        "txt_ids": torch.zeros(text_tokens, 3),
        "guidance": torch.full((1,), 3.5),
    }
    return {name: value.to(device) for name, value in inputs.items()}


def step_times(call: Call, num_steps: int) -> list[float]:
    """Time of every step of one generation."""
    return [seconds(lambda step=step: call(step)) for step in range(num_steps)]


def folder_bytes(folder: Path) -> int:
    """Size of all files below a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


@click.command()
@click.option("--blocks", default="4,8", show_default=True, help="Double and single blocks.")
@click.option("--width", default=512, show_default=True)
@click.option("--tokens", default=256, show_default=True, help="Image tokens, a square number.")
@click.option("--text-tokens", default=64, show_default=True)
@click.option("--steps", default=20, show_default=True)
@click.option("--budget", default=5, show_default=True)
@click.option("--rounds", default=7, show_default=True, help="Interleaved generations of each kind.")
@click.option("--runtime", default="inductor", show_default=True)
@click.option("--device", default="cuda" if torch.cuda.is_available() else "cpu", show_default=True)
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the numbers here too.")
@torch.no_grad()
def main(
    blocks: str,
    width: int,
    tokens: int,
    text_tokens: int,
    steps: int,
    budget: int,
    rounds: int,
    runtime: str,
    device: str,
    json_file: Path | None,
) -> None:
    """Measure; see the file's head."""
    console = Console(stderr=True)
    double, single = map(int, blocks.split(","))
    model = build_model((double, single), width, device)
    inputs = build_inputs(width, tokens, text_tokens, device)
    timesteps = torch.linspace(1, 1 / steps, steps, device=device)[:, None]

    begin = time.perf_counter()
    compiled = rc.compile(
        model, inputs, budgets=(budget,), num_steps=steps, runtime=runtime, timesteps={"timestep": timesteps},
        report=lambda stage: console.print(stage, highlight=False),
    )  # fmt: skip
    our_compile_time = time.perf_counter() - begin
    run = compiled.dispatcher(budget=budget)
    console.print("torch.compile")
    jitted = torch.compile(model)

    def arguments(step: int) -> dict[str, torch.Tensor]:
        return {**inputs, "timestep": timesteps[step]}

    calls: dict[str, Call] = {
        "eager, uncached": lambda step: model(**arguments(step), return_dict=False),
        "torch.compile, uncached": lambda step: jitted(**arguments(step), return_dict=False),
        f"recache-compile, k = {budget}": lambda step: run(step=step, **arguments(step)),
    }
    times: dict[str, list[list[float]]] = {name: [] for name in calls}
    variant = compiled.variants[0]
    lone: dict[str, list[float]] = {"recompute": [], "prologue": []}
    lone_inputs = {name: engine_inputs(compiled, name, steps, budget) for name in lone}
    for round_ in range(-1, rounds):  # the first round warms up
        console.print(f"round {round_ + 1} of {rounds}", highlight=False)
        for name, call in calls.items():
            inputs["pooled_projections"].add_(0.01)  # new conditioning: every generation pays its prologue
            taken = step_times(call, steps)
            if round_ >= 0:
                times[name].append(taken)
        for name, collected in lone.items():
            taken_alone = [seconds(lambda name=name: variant.engines[name](lone_inputs[name])) for _ in range(budget)]
            if round_ >= 0:
                collected.extend(taken_alone)

    report(compiled, times, lone, our_compile_time, steps, budget, json_file)


def engine_inputs(compiled: rc.Compiled, name: str, steps: int, budget: int) -> list[torch.Tensor]:
    """Random inputs of one engine; the prologue's tables have the rows of this schedule."""
    rows = {"recompute": budget, "forecast": steps - budget}
    variant = compiled.variants[0]
    return [
        torch.rand(
            [max(rows[value.name.rpartition("@")[2]], 2) if size is None else size for size in value.shape],
            device=variant.device,
        ).to(value.dtype)
        for value in variant.programs[name].inputs
    ]


def report(
    compiled: rc.Compiled,
    times: dict[str, list[list[float]]],
    lone: dict[str, list[float]],
    compile_time: float,
    steps: int,
    budget: int,
    json_file: Path | None,
) -> None:
    """Print the table and write the JSON."""
    totals = {name: statistics.median(map(sum, taken)) for name, taken in times.items()}
    ours = next(name for name in times if name.startswith("recache"))
    schedule = compiled.schedules[budget].recompute_steps
    recompute = statistics.median(taken[step] for taken in times[ours] for step in schedule[1:])
    cached = statistics.median(taken[step] for taken in times[ours] for step in range(steps) if step not in schedule)
    prologue = statistics.median(lone["prologue"])
    ideal = budget * statistics.median(lone["recompute"]) + prologue
    programs = compiled.variants[0].programs
    with tempfile.TemporaryDirectory() as folder:
        compiled.save(Path(folder) / "artifact")
        weight_bytes = sum(weight.nbytes for weight in compiled.weights.values())
        stored = (Path(folder) / "artifact" / "weights.safetensors").stat().st_size
        artifact = folder_bytes(Path(folder) / "artifact")
    result = {
        "machine": machine(),
        "torch": torch.__version__,
        "steps": steps,
        "budget": budget,
        "recompute_steps": schedule,
        "seconds": totals,
        "spread": {name: [min(map(sum, taken)), max(map(sum, taken))] for name, taken in times.items()},
        "ratio_to_eager": {name: totals["eager, uncached"] / total for name, total in totals.items()},
        "macs_reduction": compiled.cost(budget).macs_reduction,
        "recompute_step": recompute,
        "cached_step": cached,
        "cached_over_recompute": cached / recompute,
        "prologue": prologue,
        "generation_over_ideal": totals[ours] / ideal,
        "compile_seconds": compile_time,
        "weight_bytes": weight_bytes,
        "weight_file_bytes": stored,
        "artifact_bytes": artifact,
        "nodes": {name: program.num_calls for name, program in programs.items()},
        "history_values": sum(value.kind is Kind.FEATURE for value in programs["recompute"].outputs),
    }
    table = Table(title=f"{result['machine']}, torch {torch.__version__}, T = {steps}, k = {budget}")
    for column in ("loop", "median s", "min to max s", "speed"):
        table.add_column(column, justify="left" if column == "loop" else "right")
    for name, total in totals.items():
        low, high = result["spread"][name]
        table.add_row(name, f"{total:.3f}", f"{low:.3f} to {high:.3f}", f"x {totals['eager, uncached'] / total:.2f}")
    page = Console()
    page.print(table)
    page.print(
        f"recompute step {recompute * 1e3:.2f} ms, cached step {cached * 1e3:.3f} ms ({cached / recompute:.2%}),"
        f" prologue {prologue * 1e3:.2f} ms\n"
        f"generation / (k x recompute engine + prologue engine) = {totals[ours] / ideal:.3f}\n"
        f"MACs / {result['macs_reduction']:.2f}; weights {weight_bytes:,} B, on disk {stored:,} B, artifact {artifact:,} B",
        highlight=False,
    )
    if json_file:
        json_file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def machine() -> str:
    """The GPU's name, or the processor's with the number of threads used."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    names = [line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {torch.get_num_threads()} threads"


def _cpuinfo() -> list[str]:
    file = Path("/proc/cpuinfo")
    return file.read_text().splitlines() if file.exists() else []


if __name__ == "__main__":
    main()
