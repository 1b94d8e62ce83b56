"""`recache-compile run`: draw with an artifact."""

from pathlib import Path

import click

from recache_compile.cli.console import SEED, say, showing_stages
from recache_compile.cli.parameters import Budget


@click.command("run")
@click.argument("artifact", type=click.Path(path_type=Path))
@click.argument("caption")
@click.option(
    "--budget",
    type=Budget(),
    help="Recompute steps k, or a share of all steps: 20%.  [default: the smallest in the artifact]",
)
@click.option("--steps", type=click.IntRange(min=1), help="Denoising steps T.  [default: as compiled]")
@click.option("--seed", type=SEED, default=0, show_default=True)
@click.option("--output", type=click.Path(path_type=Path, dir_okay=False), default="picture.png", show_default=True)
@click.option(
    "--scale", type=click.IntRange(1, 64), default=8, show_default=True, help="Enlarge small pictures by this factor."
)
@click.option(
    "--offload-prologue", is_flag=True, help="Keep weights that only the prologue reads in the host's memory."
)
@click.option("--cuda-graphs/--no-cuda-graphs", default=None, help="Replay CUDA graphs.  [default: as compiled]")
def run_command(
    artifact: Path,
    caption: str,
    budget: float | None,
    steps: int | None,
    seed: int,
    output: Path,
    scale: int,
    offload_prologue: bool,
    cuda_graphs: bool | None,
) -> None:
    """Draw CAPTION with a compiled ARTIFACT."""
    with showing_stages():
        from recache_compile.pipelines.draw import draw

        drawn = draw(
            artifact, caption, output, budget=budget, steps=steps, seed=seed, scale=scale,
            offload_prologue=offload_prologue, cuda_graphs=cuda_graphs,
        )  # fmt: skip
    say(f"{output}  ({drawn.budget} of {drawn.num_steps} steps recomputed)")
