"""Measure a compiled pipeline against the uncached one: pictures, their distance, time."""

import copy
import logging
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

from recache_compile.compiler.compiled import Compiled
from recache_compile.evaluation.distances import mean_squared_error
from recache_compile.pipelines.accelerate import install
from recache_compile.pipelines.record import DENOISER

log = logging.getLogger(__name__)

MIN_SQUARED_ERROR = 1e-10
"""Floor of the mean squared error: PSNR ends at 100 dB, where pictures are equal."""


@dataclass(frozen=True, slots=True)
class Measured:
    """One budget against the uncached pipeline.

    Args:
        budget: number of recompute steps.
        recompute_steps: which they are.
        macs_reduction: times fewer multiply-accumulates per generation.
        speedup: median time of the uncached pipeline call over that of the compiled one; None
            where the engines cannot be run.
        psnr: mean over the pictures, dB; None without pictures.
        ssim: mean over the pictures; None without pictures.
    """

    budget: int
    recompute_steps: tuple[int, ...]
    macs_reduction: float
    speedup: float | None
    psnr: float | None
    ssim: float | None


def psnr(picture: Tensor, reference: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of pictures with values in [0, 1], at most 100."""
    return float(signal_to_noise(picture[None], reference[None]))


def signal_to_noise(pictures: Tensor, reference: Tensor) -> Tensor:
    """PSNR in dB of each picture with values in [0, 1], at most 100: (batch,) float64."""
    return -10 * mean_squared_error(pictures, reference).clamp(min=MIN_SQUARED_ERROR).log10()


def ssim(picture: Tensor, reference: Tensor) -> float:
    """Structural similarity (Wang et al., 2004) of pictures (batch, channels, H, W) in [0, 1]."""
    return float(structural_similarity_index_measure(picture.float(), reference.float(), data_range=1.0))


def compare(
    pipeline: Any,
    compiled: Compiled,
    calls: Sequence[Mapping[str, Any]],
    seed: int,
    repeats: int = 3,
    component: str = DENOISER,
) -> tuple[list[Measured], dict[int | None, list[Tensor]]]:
    """Make every call uncached and under every budget, from the same seeds.

    Args:
        pipeline: the uncached pipeline; its progress bar is turned off.
        compiled: what was compiled for it.
        calls: arguments of the pipeline; one picture each, seeds counting up from `seed`.
        seed: of the first picture.
        repeats: timed generations of each kind, interleaved, each with its prologue; medians count.
        component: the transformer that was compiled.

    Returns:
        The measurements, and the pictures (3, H, W) by budget, None standing for uncached;
        no pictures where the pipeline makes something else.
    """
    pipeline.set_progress_bar_config(disable=True)
    pipelines = {budget: install(copy.copy(pipeline), {component: compiled}, budget) for budget in compiled.plans} | {
        None: pipeline
    }
    pictures: dict[int | None, list[Tensor]] = {}
    for budget in (None, *compiled.plans):
        log.info("drawing uncached" if budget is None else f"drawing with budget {budget}")
        drawn = [_draw(pipelines[budget], compiled, call, seed + number) for number, call in enumerate(calls)]
        pictures[budget] = [picture for picture in drawn if picture is not None]
    log.info("timing")
    times: dict[int | None, list[float]] = {budget: [] for budget in pictures}
    for _ in range(repeats):
        for budget, taken in times.items():
            compiled.engines.revision.number += 1  # every generation runs its prologue
            taken.append(seconds(lambda budget=budget: _draw(pipelines[budget], compiled, calls[0], seed)))  # type: ignore[misc]
    measured = []
    for budget, plan in compiled.plans.items():
        pairs = list(zip(pictures[budget], pictures[None], strict=True))
        measured.append(
            Measured(
                budget=budget,
                recompute_steps=plan.schedule.recompute_steps,
                macs_reduction=compiled.cost(budget).macs_reduction,
                speedup=statistics.median(times[None]) / statistics.median(times[budget]),
                psnr=statistics.mean(psnr(*pair) for pair in pairs) if pairs else None,
                ssim=statistics.mean(ssim(ours[None], theirs[None]) for ours, theirs in pairs) if pairs else None,
            )
        )
    return measured, pictures if pictures[None] else {}


def unmeasured(compiled: Compiled) -> list[Measured]:
    """Every budget where the engines cannot be run: no speed and no pictures."""
    return [
        Measured(budget, plan.schedule.recompute_steps, compiled.cost(budget).macs_reduction, None, None, None)
        for budget, plan in compiled.plans.items()
    ]


def _draw(pipeline: Any, compiled: Compiled, call: Mapping[str, Any], seed: int) -> Tensor | None:
    """One picture (3, H, W) in [0, 1]; None where the pipeline's result has no images."""
    generator = torch.Generator().manual_seed(seed)
    steps = compiled.num_steps
    arguments = {"num_inference_steps": steps, "generator": generator, "output_type": "pt", **call}
    images = getattr(pipeline(**arguments), "images", None)
    return None if images is None else images[0].detach().cpu()


def seconds(work: Callable[[], Any]) -> float:
    """Time of one call until the devices have done it; what they were doing before is waited for first."""
    _wait()
    begin = time.perf_counter()
    work()
    _wait()
    return time.perf_counter() - begin


def _wait() -> None:
    for device in range(torch.cuda.device_count()):
        torch.cuda.synchronize(device)
