"""Calibration: what a few uncached generations tell about a model."""

from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from torch import Tensor

from recache_compile.errors import ArtifactError, DispatchError
from recache_compile.policies.base import Calibration
from recache_compile.support.features import relative_change
from recache_compile.support.files import writing

MAX_COORDINATES = 1 << 18
"""Larger values are represented by this many of their coordinates, chosen at random once."""


def calibrate(
    predictions: Sequence[Sequence[Tensor]],
    features: Sequence[Sequence[Tensor]],
    samples: int,
    step_sizes: Sequence[float],
) -> Calibration:
    """The statistics of one uncached generation.

    Args:
        predictions: of every step in turn, for each guidance branch and each tensor of its result.
        features: of every step in turn, for each guidance branch and each cache site.
        samples: number of samples in the batch.
        step_sizes: change of the noise level in each step.

    Raises:
        DispatchError: the generation left out steps, as image-to-image runs do.
    """
    if any(len(values) != len(step_sizes) for values in (*predictions, *features)):
        raise DispatchError(
            "calibration: the generation did not run all steps of this transformer; calibrate with one that does, or"
            " choose a policy that looks at nothing, such as uniform, and another forecaster than fitted"
        )
    return Calibration(
        predictions=sum_of(_gram(values, samples) for values in predictions),
        features=sum_of(_gram(values, samples) for values in features),
        step_sizes=np.asarray(step_sizes, dtype=np.float64),
        changes=np.mean([_changes(values) for values in features], 0),
        ratios=np.mean([_ratios(values) for values in features], 0),
    )


def merge_calibrations(calibrations: Sequence[Calibration]) -> Calibration:
    """One calibration of the samples of several."""
    return Calibration(
        predictions=np.concatenate([each.predictions for each in calibrations]),
        features=np.concatenate([each.features for each in calibrations]),
        step_sizes=calibrations[0].step_sizes,
        changes=np.mean([each.changes for each in calibrations], 0),
        ratios=np.mean([each.ratios for each in calibrations], 0),
    )


def step_sizes(scheduler: Any) -> np.ndarray:
    """Change of the noise level in every step of a scheduler whose timesteps are set, (T,).

    The difference of its `sigmas`; of sqrt((1 - a) / a) for schedulers that have the signal
    levels a only, as DDIM's; equal steps where it tells neither.
    """
    steps = len(scheduler.timesteps)
    sigmas = getattr(scheduler, "sigmas", None)
    if sigmas is not None and len(sigmas) == steps + 1:
        levels = torch.as_tensor(sigmas).double().cpu()
    elif hasattr(scheduler, "alphas_cumprod"):
        signal = scheduler.alphas_cumprod.double().cpu()[scheduler.timesteps.cpu().long()]
        last = torch.as_tensor(getattr(scheduler, "final_alpha_cumprod", 1.0)).double().cpu()
        signal = torch.cat([signal, last[None]])
        levels = ((1 - signal) / signal).sqrt()
    else:
        levels = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    return levels.diff().numpy()


def save_calibration(calibration: Calibration, file: Path) -> None:
    """Write a calibration as safetensors, whole or not at all."""
    arrays = {name: np.ascontiguousarray(getattr(calibration, name)) for name in Calibration.__slots__}
    with writing(file) as partial:
        save_file(arrays, partial)


def load_calibration(file: Path) -> Calibration:
    """Read what `save_calibration` wrote.

    Raises:
        ArtifactError: the file is none.
    """
    try:
        return Calibration(**load_file(file))
    except (OSError, SafetensorError, TypeError) as error:
        raise ArtifactError(f"{file}: no calibration ({error}); remove it, it is then made anew") from None


def sum_of(arrays: Iterable[np.ndarray]) -> np.ndarray:
    """Sum of equally shaped arrays."""
    return np.sum(list(arrays), 0)


def _by_sample(value: Tensor, samples: int) -> Tensor:
    """(samples, coordinates): guidance branches that were batched are a sample's own coordinates."""
    if value.dim() and value.shape[0] % samples == 0:
        return value.unflatten(0, (-1, samples)).movedim(1, 0).flatten(1)
    return value.reshape(1, -1).expand(samples, -1)


def _gram(values: Sequence[Tensor], samples: int) -> np.ndarray:
    """Gram matrices (samples, T, T) in float64 of one value over the steps."""
    rows = [_by_sample(value, samples) for value in values]
    size = rows[0].shape[1]
    if size > MAX_COORDINATES:
        chosen = torch.randperm(size, generator=torch.Generator().manual_seed(0))[:MAX_COORDINATES]
        rows = [row[:, chosen.to(row.device)] for row in rows]
    stacked = torch.stack(rows, 1).double()
    return (stacked @ stacked.mT).cpu().numpy() * (size / stacked.shape[2])


def _changes(values: Sequence[Tensor]) -> np.ndarray:
    """Relative change of a feature from step to step, (T,); 0 in the first."""
    return np.array([0.0, *(float(relative_change(now, past)) for past, now in pairwise(values))])


def _ratios(values: Sequence[Tensor]) -> np.ndarray:
    """Mean ratio of the norms of a token from step to step (MagCache, arXiv 2506.09045, equation 4), (T,)."""
    norms = [value.float().norm(dim=-1).clamp(min=1e-12) for value in values]
    return np.array([1.0, *(float((now / past).mean()) for past, now in pairwise(norms))])
