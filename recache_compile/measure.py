"""Measure a compiled pipeline against the uncached one: pictures, their distance, time."""

import copy
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

from recache_compile.compiled import Compiled
from recache_compile.pipelines import accelerate

MIN_SQUARED_ERROR = 1e-10
"""Floor of the mean squared error: PSNR ends at 100 dB, where pictures are equal."""


@dataclass(frozen=True, slots=True)
class Measured:
    """One budget against the uncached pipeline.

    Args:
        budget: number of recompute steps.
        recompute_steps: which they are.
        macs_reduction: times fewer multiply-accumulates per generation.
        speedup: median time of the uncached pipeline call over that of the compiled one.
        psnr: mean over the pictures, dB; None without pictures.
        ssim: mean over the pictures; None without pictures.
    """

    budget: int
    recompute_steps: tuple[int, ...]
    macs_reduction: float
    speedup: float
    psnr: float | None
    ssim: float | None


def psnr(picture: Tensor, reference: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of pictures with values in [0, 1], at most 100."""
    error = (picture.double() - reference.double()).square().mean().clamp(min=MIN_SQUARED_ERROR)
    return float(-10 * error.log10())


def ssim(picture: Tensor, reference: Tensor) -> float:
    """Structural similarity (Wang et al., 2004) of pictures (batch, channels, H, W) in [0, 1]."""
    return float(structural_similarity_index_measure(picture.float(), reference.float(), data_range=1.0))


def compare(
    pipeline: Any,
    compiled: Compiled,
    prompts: Sequence[str],
    seed: int,
    repeats: int = 3,
    report: Callable[[str], None] = lambda stage: None,
) -> tuple[list[Measured], dict[int | None, list[Tensor]]]:
    """Draw every prompt uncached and under every budget, from the same seeds.

    Args:
        pipeline: the uncached pipeline; it stays as it is.
        compiled: what was compiled for it.
        prompts: one picture each, seeds counting up from `seed`.
        seed: of the first picture.
        repeats: timed generations of each kind, interleaved; medians count.
        report: told what begins.

    Returns:
        The measurements, and the pictures (3, H, W) by budget; None stands for uncached.
    """
    pipeline.set_progress_bar_config(disable=True)
    compiled_pipeline = accelerate(copy.copy(pipeline), compiled)

    def draw(number: int, budget: int | None) -> Tensor:
        options = {} if budget is None else {"budget": budget}
        images = (pipeline if budget is None else compiled_pipeline)(
            prompts[number],
            num_inference_steps=compiled.description.num_steps,
            generator=torch.Generator().manual_seed(seed + number),
            output_type="pt",
            **options,
        ).images
        return images[0].detach().cpu()

    pictures: dict[int | None, list[Tensor]] = {}
    for budget in (None, *compiled.plans):
        report("drawing uncached" if budget is None else f"drawing with budget {budget}")
        pictures[budget] = [draw(number, budget) for number in range(len(prompts))]
    report("timing")
    times: dict[int | None, list[float]] = {budget: [] for budget in pictures}
    for _ in range(repeats):
        for budget, taken in times.items():
            taken.append(_seconds(lambda budget=budget: draw(0, budget)))  # type: ignore[misc]
    measured = [
        Measured(
            budget=budget,
            recompute_steps=plan.schedule.recompute_steps,
            macs_reduction=compiled.cost(budget).macs_reduction,
            speedup=statistics.median(times[None]) / statistics.median(times[budget]),
            psnr=statistics.mean(psnr(*pair) for pair in zip(pictures[budget], pictures[None], strict=True)),
            ssim=statistics.mean(
                ssim(ours[None], theirs[None]) for ours, theirs in zip(pictures[budget], pictures[None], strict=True)
            ),
        )
        for budget, plan in compiled.plans.items()
    ]
    return measured, pictures


def _seconds(work: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begin
