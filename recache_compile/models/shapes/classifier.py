"""Reads a scene's attributes off a picture: the judge of what `shapes` draws."""

from importlib.util import find_spec
from pathlib import Path

import torch
from diffusers import ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from torch import Tensor, nn

from recache_compile.models.shapes.scenes import ATTRIBUTES, SIZE

WEIGHTS = Path(__file__).parent / "weights"


class SceneClassifier(ModelMixin, ConfigMixin):
    """A small convolutional network with one linear head for all attributes.

    Args:
        channels: of the four stages; each stage but the first halves the resolution.
    """

    config_name = "config.json"

    @register_to_config
    def __init__(self, channels: tuple[int, ...] = (32, 48, 64, 64)) -> None:
        super().__init__()
        stages: list[nn.Module] = []
        previous = 3
        for number, width in enumerate(channels):
            stages += [nn.Conv2d(previous, width, 3, 1 if number == 0 else 2, 1), nn.GroupNorm(8, width), nn.GELU()]
            previous = width
        self.stages = nn.Sequential(*stages)
        side = SIZE // 2 ** (len(channels) - 1)
        self.head = nn.Linear(previous * side * side, sum(map(len, ATTRIBUTES.values())))

    def features(self, pictures: Tensor) -> Tensor:
        """(batch, 3, 32, 32) in [-1, 1] to the last stage's features, flattened."""
        return self.stages(pictures).flatten(1)

    def forward(self, pictures: Tensor) -> tuple[Tensor, ...]:
        """Logits (batch, classes), one tensor for each entry of `ATTRIBUTES`."""
        return self.head(self.features(pictures)).split([len(names) for names in ATTRIBUTES.values()], 1)

    @torch.no_grad()
    def recognised(self, pictures: Tensor, attributes: Tensor) -> Tensor:
        """Whether each attribute is read as stated: boolean (batch, 6).

        Args:
            pictures: (batch, 3, 32, 32) in [-1, 1].
            attributes: integer (batch, 6), see `Scene.attributes`.
        """
        read = torch.stack([logits.argmax(1) for logits in self(pictures)], 1)
        return read == attributes.to(read.device)


def load_classifier(folder: Path = WEIGHTS) -> SceneClassifier:
    """The classifier of a pipeline's folder, in float32."""
    lean = find_spec("accelerate") is not None  # without it, asking for little memory only warns
    model = SceneClassifier.from_pretrained(folder / "classifier", dtype=torch.float32, low_cpu_mem_usage=lean)
    return model.eval()  # type: ignore[no-any-return]
