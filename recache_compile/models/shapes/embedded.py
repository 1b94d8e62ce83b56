"""What `models.registry.EmbeddedCode` asks of a model, for `shapes`."""

import random
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from recache_compile.models.shapes import judges
from recache_compile.models.shapes.classifier import load_classifier
from recache_compile.models.shapes.pipeline import ShapesPipeline
from recache_compile.models.shapes.scenes import SIZE, parse_caption, sample_scene

PICTURE_SIZE = SIZE

_DISTANCES = {"features": judges.feature_distance}
_REWARDS = {"caption": judges.caption_reward, "attributes": judges.attributes_read}


def pipeline_class() -> Any:
    """The pipeline's class."""
    return ShapesPipeline


def captions() -> tuple[str, ...]:
    """About 2,000 different sentences that the model knows."""
    rng = random.Random(20_260)
    return tuple(dict.fromkeys(sample_scene(rng).caption() for _ in range(2048)))


def check_caption(caption: str) -> None:
    """Raise `ValueError` unless a caption is of the one form that the model knows."""
    parse_caption(caption)


def distance(name: str) -> Callable[[Tensor, Tensor], Tensor]:
    """A distance with its classifier."""
    return partial(_DISTANCES[name], load_classifier())


def reward(name: str) -> Callable[[Tensor, Sequence[str]], Tensor]:
    """A reward with its classifier."""
    return partial(_REWARDS[name], load_classifier())


def features() -> Callable[[Tensor], Tensor]:
    """From pictures (batch, 3, 32, 32) to (batch, 64)."""
    return partial(judges.pooled_features, load_classifier())


def reference_features(captions: Sequence[str]) -> Tensor:
    """Features (4096, 64) of scenes that code draws."""
    return judges.features_of_scenes(load_classifier(), captions)
