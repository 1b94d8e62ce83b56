"""`recache-compile run`: draw with an artifact."""

from pathlib import Path

import click

from recache_compile.cli.console import SEED, say, showing_stages
from recache_compile.errors import ModelError


@click.command("run")
@click.argument("artifact", type=click.Path(path_type=Path))
@click.argument("caption")
@click.option("--budget", type=int, help="Recompute steps k.  [default: the smallest in the artifact]")
@click.option("--seed", type=SEED, default=0, show_default=True)
@click.option("--output", type=click.Path(path_type=Path, dir_okay=False), default="picture.png", show_default=True)
@click.option(
    "--scale", type=click.IntRange(1, 64), default=8, show_default=True, help="Enlarge small pictures by this factor."
)
@click.option(
    "--offload-prologue", is_flag=True, help="Keep weights that only the prologue reads in the host's memory."
)
@click.option(
    "--cuda-graphs/--no-cuda-graphs", default=None, help="ReplayDispatcher CUDA graphs.  [default: as compiled]"
)
def run_command(
    artifact: Path,
    caption: str,
    budget: int | None,
    seed: int,
    output: Path,
    scale: int,
    offload_prologue: bool,
    cuda_graphs: bool | None,
) -> None:
    """Draw CAPTION with a compiled ARTIFACT."""
    with showing_stages() as report:
        report("loading libraries")
        import torch

        from recache_compile.artifact.store import load
        from recache_compile.pipelines.accelerate import accelerate
        from recache_compile.pipelines.load import load_pipeline
        from recache_compile.pipelines.record import prompted
        from recache_compile.support.files import check_file, writing

        check_file(output)
        report(f"loading {artifact}")
        compiled = load(artifact, offload_prologue=offload_prologue, cuda_graphs=cuda_graphs)
        facts = compiled.description
        dtype = getattr(torch, facts.dtype)
        device = compiled.variants[0].device
        pipeline = load_pipeline(facts.model, dtype, device, **{facts.component: None})
        accelerate(pipeline, {facts.component: compiled}, budget)
        pipeline.set_progress_bar_config(disable=True)
        report("drawing")
        generator = torch.Generator().manual_seed(seed)
        arguments = {**prompted(pipeline, caption, facts.call), "num_inference_steps": facts.num_steps}
        images = getattr(pipeline(**arguments, generator=generator), "images", None)
        if images is None:
            raise ModelError(f"{facts.model}: the pipeline makes no images; use it from Python instead")
        picture = images[0]
        if max(picture.size) <= 128:
            picture = picture.resize((picture.width * scale, picture.height * scale), resample=0)
        with writing(output) as partial:
            picture.save(partial, format="PNG")
    chosen = getattr(pipeline, facts.component).budget
    say(f"{output}  ({chosen} of {facts.num_steps} steps recomputed)")
