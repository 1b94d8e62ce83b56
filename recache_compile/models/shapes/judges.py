"""How far pictures of `shapes` are from each other and from their captions, in the eyes of its classifier.

Pictures are (batch, 3, 32, 32) with values in [0, 1].
"""

from collections.abc import Sequence
from itertools import cycle, islice

import torch
from torch import Tensor
from torch.nn.functional import log_softmax, normalize

from recache_compile.errors import ModelError
from recache_compile.models.shapes.classifier import SceneClassifier
from recache_compile.models.shapes.scenes import parse_caption, render

SCENES = 4096
"""Pictures of the reference set."""


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


def caption_reward(classifier: SceneClassifier, pictures: Tensor, captions: Sequence[str]) -> Tensor:
    """Mean log-probability of a caption's six attributes under the shipped classifier, (batch,)."""
    attributes = _attributes("reward caption", captions).to(pictures.device)
    logits = classifier.to(pictures.device)(pictures * 2 - 1)
    picked = [log_softmax(each, 1).gather(1, attributes[:, [index]]) for index, each in enumerate(logits)]
    return torch.cat(picked, 1).mean(1)


def attributes_read(classifier: SceneClassifier, pictures: Tensor, captions: Sequence[str]) -> Tensor:
    """Share of a caption's six attributes that the shipped classifier reads off each picture, in percent, (batch,)."""
    attributes = _attributes("reward attributes", captions)
    return 100 * classifier.to(pictures.device).recognised(pictures * 2 - 1, attributes).double().mean(1)


def pooled_features(classifier: SceneClassifier, pictures: Tensor) -> Tensor:
    """The shipped classifier's last features, averaged over space: (batch, 64)."""
    return classifier.to(pictures.device).stages(pictures * 2 - 1).mean((2, 3))


@torch.no_grad()
def features_of_scenes(classifier: SceneClassifier, captions: Sequence[str]) -> Tensor:
    """Pooled features (SCENES, 64) of scenes that code draws for captions, taken in turn: the data itself."""
    attributes = _attributes("metric fid", list(islice(cycle(captions), SCENES)))
    return pooled_features(classifier, render(attributes, torch.Generator().manual_seed(0)) / 2 + 0.5)


def _attributes(judge: str, captions: Sequence[str]) -> Tensor:
    """Classes (batch, 6) of what captions say."""
    try:
        return torch.tensor([parse_caption(caption).attributes() for caption in captions])
    except ValueError as error:
        raise ModelError(f"{judge}: {error}") from error


def _stages(classifier: SceneClassifier, pictures: Tensor) -> list[Tensor]:
    """Features (batch, channels, h, w) after every activation, of unit length over the channels."""
    taken = []
    for layer in classifier.stages:
        pictures = layer(pictures)
        if isinstance(layer, torch.nn.GELU):
            taken.append(normalize(pictures, dim=1))
    return taken
