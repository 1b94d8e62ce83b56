"""The two halves of the training objective L = d(x, x_full) - alpha R(x): distances and rewards."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import log_softmax, normalize
from torchmetrics.functional.image import structural_similarity_index_measure

from recache_compile.errors import ModelError, RuntimeUnavailableError
from recache_compile.evaluation.pretrained import load_clip, load_hpsv2, load_imagereward, load_lpips
from recache_compile.models.shapes.classifier import SceneClassifier
from recache_compile.models.shapes.scenes import parse_caption

SHAPES = "shapes"
"""The embedded model, which has judges of its own."""
ONLY_SHAPES = ("features", "caption", "attributes")
"""Judges, of all kinds, that judge pictures of shapes only."""

PictureDistance = Callable[[Tensor, Tensor], Tensor]
PictureReward = Callable[[Tensor, Sequence[str]], Tensor]


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
        pairs = zip(_frames(pictures, self.name), _frames(reference, self.name), strict=True)
        return torch.stack([self.measure(*pair).double() for pair in pairs]).mean(0)


@dataclass(frozen=True, slots=True)
class Reward:
    """How well pictures or videos show their prompts: higher is better.

    Args:
        name: which reward it is.
        judge: pictures (batch, 3, H, W) float32 in [0, 1] and a prompt each, to (batch,).
    """

    name: str
    judge: PictureReward

    @torch.no_grad()
    def __call__(self, pictures: Tensor, prompts: Sequence[str]) -> Tensor:
        """Rewards (batch,) in float64, each of one sample alone; the mean over a video's frames.

        Args:
            pictures: (batch, 3, H, W) or (batch, frames, 3, H, W) in [0, 1].
            prompts: one for each sample.

        Raises:
            ModelError: not one prompt for each sample, or a prompt that the judge cannot read.
        """
        if len(prompts) != len(pictures):
            raise ModelError(
                f"reward {self.name}: {len(prompts)} prompts for {len(pictures)} samples; give one for each"
            )
        return torch.stack([self.judge(frame, prompts).double() for frame in _frames(pictures, self.name)]).mean(0)


def get_distance(name: str, model: str) -> Distance:
    """The distance of this name, ready to use.

    Args:
        name: a key of `DISTANCES`, or "auto": "features" for shapes, else "lpips" where it can be
            had, else "ssim"; the result's `name` tells which.
        model: whose pictures it will judge, as the user wrote it.

    Raises:
        ModelError: no distance has this name, or it does not judge this model.
        RuntimeUnavailableError: its package or its weights are missing.
    """
    if name == "auto":
        return _automatic(model)
    require_judge("distance", name, model, ("auto", *DISTANCES))
    return Distance(name, DISTANCES[name]())


def get_reward(name: str, model: str) -> Reward:
    """The reward of this name, ready to use.

    Args:
        name: a key of `REWARDS`.
        model: whose pictures it will judge, as the user wrote it.

    Raises:
        ModelError: no reward has this name, or it does not judge this model.
        RuntimeUnavailableError: its package or its weights are missing.
    """
    require_judge("reward", name, model, tuple(REWARDS))
    return Reward(name, REWARDS[name]())


def mean_squared_error(pictures: Tensor, reference: Tensor) -> Tensor:
    """Mean squared difference of each picture, (batch,) float64."""
    return (pictures.double() - reference.double()).square().flatten(1).mean(1)


def dissimilarity(pictures: Tensor, reference: Tensor) -> Tensor:
    """1 - SSIM (Wang et al., 2004; Gaussian window of 11 pixels, borders mirrored) of each picture, (batch,) float64."""
    similarity = structural_similarity_index_measure(
        pictures.double(), reference.double(), data_range=1.0, reduction="none"
    )
    return (1 - similarity).clamp(min=0)


def feature_distance(classifier: SceneClassifier, pictures: Tensor, reference: Tensor) -> Tensor:
    """Mean squared difference of unit-length features over all stages, (batch,).

    As LPIPS (arXiv 1801.03924, eq. 1) with the shipped classifier for a backbone and equal
    channel weights.  All stages count, because the last one alone, like the logits, hardly
    moves while a blemish leaves the scene's attributes readable.
    """
    classifier = classifier.to(pictures.device)
    ours, theirs = (_stages(classifier, batch * 2 - 1) for batch in (pictures, reference))
    stages = [(one - other).square().sum(1).flatten(1).mean(1) for one, other in zip(ours, theirs, strict=True)]
    return torch.stack(stages).mean(0)


def caption_reward(classifier: SceneClassifier, pictures: Tensor, prompts: Sequence[str]) -> Tensor:
    """Mean log-probability of a caption's six attributes under the shipped classifier, (batch,)."""
    attributes = _attributes("caption", prompts).to(pictures.device)
    logits = classifier.to(pictures.device)(pictures * 2 - 1)
    picked = [log_softmax(each, 1).gather(1, attributes[:, [index]]) for index, each in enumerate(logits)]
    return torch.cat(picked, 1).mean(1)


def attributes_read(classifier: SceneClassifier, pictures: Tensor, prompts: Sequence[str]) -> Tensor:
    """Share of a caption's six attributes that the shipped classifier reads off each picture, in percent, (batch,)."""
    attributes = _attributes("attributes", prompts)
    return 100 * classifier.to(pictures.device).recognised(pictures * 2 - 1, attributes).double().mean(1)


def shapes_features() -> Callable[[Tensor], Tensor]:
    """From pictures (batch, 3, 32, 32) in [0, 1] to the shipped classifier's last features, averaged over space."""
    classifier = _classifier()
    return lambda pictures: classifier.to(pictures.device).stages(pictures * 2 - 1).mean((2, 3))


def _attributes(judge: str, prompts: Sequence[str]) -> Tensor:
    """Classes (batch, 6) of what captions say."""
    try:
        return torch.tensor([parse_caption(prompt).attributes() for prompt in prompts])
    except ValueError as error:
        raise ModelError(f"reward {judge}: {error}") from error


def _stages(classifier: SceneClassifier, pictures: Tensor) -> list[Tensor]:
    """Features (batch, channels, h, w) after every activation, of unit length over the channels."""
    taken = []
    for layer in classifier.stages:
        pictures = layer(pictures)
        if isinstance(layer, torch.nn.GELU):
            taken.append(normalize(pictures, dim=1))
    return taken


def _automatic(model: str) -> Distance:
    if model == SHAPES:
        return get_distance("features", model)
    try:
        return get_distance("lpips", model)
    except RuntimeUnavailableError:
        return get_distance("ssim", model)


def _classifier() -> SceneClassifier:
    from recache_compile.models.shapes.evaluate import load_classifier

    return load_classifier()


def _no_reward(pictures: Tensor, prompts: Sequence[str]) -> Tensor:
    return torch.zeros(len(pictures), device=pictures.device)


DISTANCES: dict[str, Callable[[], PictureDistance]] = {
    "mse": lambda: mean_squared_error,
    "ssim": lambda: dissimilarity,
    "lpips": load_lpips,
    "features": lambda: partial(feature_distance, _classifier()),
}
REWARDS: dict[str, Callable[[], PictureReward]] = {
    "none": lambda: _no_reward,
    "caption": lambda: partial(caption_reward, _classifier()),
    "attributes": lambda: partial(attributes_read, _classifier()),
    "clip": load_clip,
    "hpsv2": load_hpsv2,
    "imagereward": load_imagereward,
}


def _frames(pictures: Tensor, judge: str) -> tuple[Tensor, ...]:
    """The batch frame by frame in float32, which bounds the memory a long video takes."""
    if pictures.dim() not in (4, 5) or pictures.shape[-3] != 3:
        raise ModelError(
            f"{judge}: expected pictures (batch, 3, H, W) or videos (batch, frames, 3, H, W),"
            f" not a tensor of shape {tuple(pictures.shape)}"
        )
    return (pictures.float(),) if pictures.dim() == 4 else pictures.float().unbind(1)


def require_judge(kind: str, name: str, model: str, names: Collection[str]) -> None:
    """Raise `ModelError` unless there is a judge of this name, and it judges this model."""
    if name not in names:
        raise ModelError(f"{kind} {name!r} is unknown; choose {', '.join(names)}")
    if name in ONLY_SHAPES and model != SHAPES:
        others = ", ".join(other for other in names if other not in ONLY_SHAPES)
        raise ModelError(f"{kind} {name!r} judges pictures of shapes only, not of {model}; choose {others}")
