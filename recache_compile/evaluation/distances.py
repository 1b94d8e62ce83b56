"""d of the training objective L = d(x, x_uncached) - alpha R(x): how far a result is from the uncached one."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

from recache_compile.errors import ModelError, RuntimeUnavailableError
from recache_compile.evaluation.judges import frames_of, own_names, require_judge
from recache_compile.evaluation.pretrained import load_lpips
from recache_compile.models.registry import find

PictureDistance = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Distance:
    """How far pictures or videos are from their reference: 0 where equal (up to rounding), lower is better.

    Args:
        name: which distance it is; never "auto".
        measure: pictures and reference, each (batch, 3, H, W) float32 in [0, 1], to (batch,).
    """

    name: str
    measure: PictureDistance

    @torch.no_grad()
    def __call__(self, pictures: Tensor, reference: Tensor) -> Tensor:
        """Distances (batch,) in float64, each of one sample alone; the mean over a video's frames.

        Args:
            pictures: (batch, 3, H, W) or (batch, frames, 3, H, W) in [0, 1].
            reference: of the same shape.

        Raises:
            ModelError: the shapes differ, or are of neither kind.
        """
        if pictures.shape != reference.shape:
            raise ModelError(
                f"distance {self.name}: pictures {tuple(pictures.shape)} and reference {tuple(reference.shape)} differ"
                " in shape; draw both at one size"
            )
        pairs = zip(frames_of(pictures, self.name), frames_of(reference, self.name), strict=True)
        return torch.stack([self.measure(*pair).double() for pair in pairs]).mean(0)


def get_distance(name: str, model: str) -> Distance:
    """The distance of this name, ready to use.

    Args:
        name: a key of `DISTANCES`, a distance that the embedded model has for itself, or "auto":
            what the embedded model says, else "lpips" where it can be had, else "ssim"; the
            result's `name` tells which.
        model: whose pictures it will judge, as the user wrote it.

    Raises:
        ModelError: no distance has this name, or it does not judge this model.
        RuntimeUnavailableError: its package or its weights are missing.
    """
    if name == "auto":
        return _automatic(model)
    own, embedded = own_names("distance", model), find(model)
    require_judge("distance", name, model, ("auto", *DISTANCES, *own))
    if embedded is not None and name in own:
        return Distance(name, embedded.code().distance(name))
    return Distance(name, DISTANCES[name]())


def mean_squared_error(pictures: Tensor, reference: Tensor) -> Tensor:
    """Mean squared difference of each picture, (batch,) float64."""
    return (pictures.double() - reference.double()).square().flatten(1).mean(1)


def dissimilarity(pictures: Tensor, reference: Tensor) -> Tensor:
    """1 - SSIM (Wang et al., 2004; Gaussian window of 11 pixels, mirrored borders) of pictures, (batch,) float64."""
    similarity = structural_similarity_index_measure(
        pictures.double(), reference.double(), data_range=1.0, reduction="none"
    )
    return (1 - similarity).clamp(min=0)


def _automatic(model: str) -> Distance:
    embedded = find(model)
    if embedded is not None:
        return get_distance(embedded.distance, model)
    try:
        return get_distance("lpips", model)
    except RuntimeUnavailableError:
        return get_distance("ssim", model)


DISTANCES: dict[str, Callable[[], PictureDistance]] = {
    "mse": lambda: mean_squared_error,
    "ssim": lambda: dissimilarity,
    "lpips": load_lpips,
}
"""Those that judge pictures of any model; embedded models may have others of their own."""
