"""What the dispatcher itself takes: microseconds of a call, with engines that do nothing.

    python benchmarks/dispatch.py

A FLUX-shaped call of one and of two guidance branches, under a plan of T = 50 steps; medians of
the cached and of the recompute steps.  What is left out is what engines compute, nothing else.
"""

import datetime
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor

import recache_compile as rc
from recache_compile.compiler.compiled import Compiled
from recache_compile.runtimes.base import Engine, Variant, new_outputs
from recache_compile.support.machine import machine

STEPS, BUDGET = 50, 10


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


def build() -> tuple[Compiled, dict[str, Tensor], Tensor]:
    """Idle engines of a small FLUX, the arguments of a call, and its timesteps (T, 1)."""
    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        guidance_embeds=True,
        axes_dims_rope=(4, 4, 8),
    ).eval()
    inputs = {
        "hidden_states": torch.randn(1, 64, 16),
        "encoder_hidden_states": torch.randn(1, 32, 32),
        "pooled_projections": torch.randn(1, 32),
        "timestep": torch.ones(1),
        "img_ids": torch.zeros(64, 3),
        "txt_ids": torch.zeros(32, 3),
        "guidance": torch.full((1,), 3.5),
    }
    times = torch.linspace(1, 1 / STEPS, STEPS)[:, None]
    compiled = rc.compile(
        model, inputs, budgets=(BUDGET,), num_steps=STEPS, runtime="eager", timesteps={"timestep": times}
    )
    engines = replace(compiled.engines, variants=tuple(map(idle, compiled.variants)))
    return replace(compiled, engines=engines), inputs, times


def measure(rounds: int) -> dict[str, Any]:
    """Microseconds of one call by number of branches and kind of step."""
    compiled, inputs, times = build()
    recompute = set(compiled.schedules[BUDGET].recompute_steps)
    found: dict[str, Any] = {}
    for branches in (("",), ("cond", "uncond")):
        given = [
            {name: value if name in ("img_ids", "txt_ids") else value + number for name, value in inputs.items()}
            for number, _ in enumerate(branches)
        ]
        run = compiled.dispatcher(BUDGET)
        taken: dict[str, list[float]] = {"first step": [], "recompute step": [], "cached step": []}
        for number in range(rounds + 1):
            run.reset()
            for step in range(STEPS):
                kind = "first step" if step == 0 else "recompute step" if step in recompute else "cached step"
                for branch, arguments in zip(branches, given, strict=True):
                    call = {**arguments, "timestep": times[step]}
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
    found = {
        "machine": machine("cpu"),
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
        "steps": STEPS,
        "budget": BUDGET,
        "microseconds": measure(rounds),
    }
    for branches, kinds in found["microseconds"].items():
        click.echo(f"{branches}: " + ", ".join(f"{kind} {value:.1f} us" for kind, value in kinds.items()))
    if json_file:
        json_file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
