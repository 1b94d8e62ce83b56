"""Draw one picture with an artifact."""

import logging
from pathlib import Path

import torch

from recache_compile.artifact.store import load
from recache_compile.errors import ModelError
from recache_compile.ir.schedule import Schedule
from recache_compile.pipelines.accelerate import install
from recache_compile.pipelines.load import load_pipeline
from recache_compile.pipelines.record import prompted
from recache_compile.support.files import check_file, writing

log = logging.getLogger(__name__)

SMALL = 128
"""Pixels up to which a picture is enlarged."""


def draw(
    artifact: Path,
    caption: str,
    output: Path,
    *,
    budget: float | None = None,
    steps: int | None = None,
    seed: int = 0,
    scale: int = 8,
    offload_prologue: bool = False,
    cuda_graphs: bool | None = None,
) -> Schedule:
    """Write the picture of a caption as PNG.

    Args:
        artifact: folder; it tells its pipeline.
        caption: the prompt.
        output: file to write.
        budget: number of recompute steps k, or a share of all steps; None: the smallest in the artifact.
        steps: of the denoising loop T; None: as many as were compiled.
        seed: of the noise.
        scale: small pictures are enlarged by this factor.
        offload_prologue, cuda_graphs: as of `load`.

    Returns:
        The schedule that was run.

    Raises:
        RecacheError: naming what cannot be done and the remedy.
    """
    check_file(output)
    log.info("loading %s", artifact)
    compiled = load(artifact, offload_prologue=offload_prologue, cuda_graphs=cuda_graphs)
    model, config = compiled.description.model, compiled.engines.config
    pipeline = load_pipeline(model, getattr(torch, config.dtype), compiled.engines.device, **{config.component: None})
    install(pipeline, {config.component: compiled}, budget)
    pipeline.set_progress_bar_config(disable=True)
    log.info("drawing")
    arguments = {"num_inference_steps": compiled.num_steps, **prompted(pipeline, caption, config.call)}
    arguments |= {} if steps is None else {"num_inference_steps": steps}
    images = getattr(pipeline(**arguments, generator=torch.Generator().manual_seed(seed)), "images", None)
    if images is None:
        raise ModelError(f"{model}: the pipeline makes no images; use it from Python instead")
    picture = images[0]
    if max(picture.size) <= SMALL:
        picture = picture.resize((picture.width * scale, picture.height * scale), resample=0)
    with writing(output) as partial:
        picture.save(partial, format="PNG")
    return getattr(pipeline, config.component).plan_for(pipeline.scheduler).schedule
