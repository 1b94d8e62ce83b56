"""How long a change of adapters takes on a pipeline that runs on engines, against what it is measured by.

    python benchmarks/adapters.py --width 1536 --rounds 10

A FLUX-shaped transformer with random weights, on the CPU.  Two LoRAs of rank 16 take turns, on the
attention's layers or on all linear ones.  Nothing is compiled: a change writes weights.  Wall clock is a
median, the processor's time (all threads together) a minimum of one process.
"""

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import torch
from apart import conditions, write
from diffusers import FluxTransformer2DModel
from peft import LoraConfig
from rich.console import Console
from rich.table import Table

import recache_compile as rc
from recache_compile.pipelines.transformer import CompiledTransformer

STEPS = 2
TOKENS = 16
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
LAYERS = {"attention": ATTENTION, "all linear layers": "all-linear"}


def model(width: int, dtype: torch.dtype) -> FluxTransformer2DModel:
    """Two double and four single blocks."""
    torch.manual_seed(0)
    heads = width // 128
    return (
        FluxTransformer2DModel(
            in_channels=16,
            num_layers=2,
            num_single_layers=4,
            attention_head_dim=128,
            num_attention_heads=heads,
            joint_attention_dim=64,
            pooled_projection_dim=32,
            axes_dims_rope=(16, 56, 56),
        )
        .to(dtype)
        .eval()
    )


def inputs(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Arguments of one call."""
    return {
        "hidden_states": torch.randn(1, TOKENS, 16, dtype=dtype),
        "encoder_hidden_states": torch.randn(1, 8, 64, dtype=dtype),
        "pooled_projections": torch.randn(1, 32, dtype=dtype),
        "timestep": torch.ones(1, dtype=dtype),
        "img_ids": torch.zeros(TOKENS, 3),
        "txt_ids": torch.zeros(8, 3),
    }


def timed(do: Callable[[int], Any], rounds: int) -> dict[str, float]:
    """Seconds of every round but the first, and of the processor, whose time others on the machine do not take."""
    found, busy = [], []
    for at in range(rounds + 1):
        begin, begun = time.perf_counter(), time.process_time()
        do(at)
        found.append(time.perf_counter() - begin)
        busy.append(time.process_time() - begun)
    return {"median": statistics.median(found[1:]), "minimum": min(found[1:]), "processor": min(busy[1:])}


def measured(layers: Any, width: int, rounds: int, dtype: torch.dtype) -> dict[str, Any]:
    """Seconds of a change of adapters, of a refit of all weights and of the way back."""
    original = model(width, dtype)
    parameters = sum(each.numel() for each in original.parameters())
    timesteps = {"timestep": torch.tensor([[1.0], [0.5]], dtype=dtype)}
    options: Any = {"budgets": (STEPS,), "num_steps": STEPS, "policy": "uniform", "runtime": "eager"}
    compiled = rc.compile(original, inputs(dtype), timesteps=timesteps, **options)
    state = {name: weight.clone() for name, weight in original.state_dict().items()}
    loop: Any = SimpleNamespace(scheduler=SimpleNamespace(timesteps=timesteps["timestep"][:, 0]))
    transformer = CompiledTransformer(compiled, loop, STEPS, original)
    for name in "ab":
        transformer.add_adapter(LoraConfig(r=16, init_lora_weights=False, target_modules=layers), name)
    swap = timed(lambda at: transformer.set_adapters(["ab"[at % 2]]), rounds)
    both = timed(lambda at: transformer.set_adapters(["a", "b"], [0.1 * at, 0.5]), rounds)
    changed = sum(each.numel() for each in compiled.engines.overlay.weights.values())
    off = timed(lambda at: transformer.disable_lora() if at else None, 1)
    transformer.unload_lora()
    return {
        "parameters": parameters,
        "changed": changed,
        "swap": swap,
        "two at once": both,
        "off": off,
        "refit": timed(lambda _: compiled.refit(state), rounds),
    }


@click.command()
@click.option("--width", default=1536, show_default=True, help="A multiple of 128.")
@click.option("--rounds", default=10, show_default=True)
@click.option("--threads", default=2, show_default=True)
@click.option("--dtype", default="float32", show_default=True)
@click.option("--json", "file", type=click.Path(path_type=Path), help="Where the numbers go.")
def main(width: int, rounds: int, threads: int, dtype: str, file: Path | None) -> None:
    """Measure, and print a table."""
    torch.set_num_threads(threads)
    with torch.no_grad():
        found = {name: measured(layers, width, rounds, getattr(torch, dtype)) for name, layers in LAYERS.items()}
    table = Table("adapters on", "parameters", "changed", "wall clock", "processor", "per 1e9", "two at once", "refit")
    for name, each in found.items():
        billions, busy = each["parameters"] / 1e9, each["swap"]["processor"]
        table.add_row(
            name,
            f"{billions:.2f} G",
            f"{each['changed'] / each['parameters']:.0%}",
            f"{each['swap']['median']:.2f} s",
            f"{busy:.2f} s",
            f"{busy / billions:.2f} s",
            f"{each['two at once']['processor']:.2f} s",
            f"{each['refit']['processor']:.2f} s",
        )
    Console().print(table)
    write({**conditions(), "dtype": dtype, "seconds": found}, file)


if __name__ == "__main__":
    main()
