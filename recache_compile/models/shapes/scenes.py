"""Scenes of two coloured shapes: captions, attributes and the code that draws them.

A caption such as "a red circle left of a blue square on a dark background" has six
attributes.  They are stated for the *first* object (the left or upper one) and the
*second*, so that "A right of B" and "B left of A" have equal attributes and a picture
determines them uniquely.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

SIZE = 32
COLORS = {
    "red": (0.90, 0.12, 0.15),
    "green": (0.10, 0.70, 0.20),
    "blue": (0.15, 0.30, 0.95),
    "yellow": (0.98, 0.85, 0.10),
    "magenta": (0.85, 0.15, 0.80),
    "cyan": (0.10, 0.80, 0.85),
}
SHAPES = ("circle", "square", "triangle", "cross", "ring", "diamond")
RELATIONS = ("left of", "right of", "above", "below")
BACKGROUNDS = ("dark", "light", "striped", "checkered")
LAYOUTS = ("horizontal", "vertical")

ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "layout": LAYOUTS,
    "first color": tuple(COLORS),
    "first shape": SHAPES,
    "second color": tuple(COLORS),
    "second shape": SHAPES,
    "background": BACKGROUNDS,
}
WORDS = tuple(sorted({"a", "on", "background", *COLORS, *SHAPES, *BACKGROUNDS, *" ".join(RELATIONS).split()}))

_ANTIALIAS = 1.5  # pixels over which an edge fades


@dataclass(frozen=True, slots=True)
class Scene:
    """What a caption says, in the caption's own order."""

    color: str
    shape: str
    relation: str
    other_color: str
    other_shape: str
    background: str

    def caption(self) -> str:
        """The sentence that the text encoder reads."""
        return (
            f"a {self.color} {self.shape} {self.relation} a {self.other_color} {self.other_shape}"
            f" on a {self.background} background"
        )

    def attributes(self) -> tuple[int, ...]:
        """Class index of every entry of `ATTRIBUTES`, in its order."""
        layout = "horizontal" if self.relation in ("left of", "right of") else "vertical"
        one, two = (self.color, self.shape), (self.other_color, self.other_shape)
        first, second = (one, two) if self.relation in ("left of", "above") else (two, one)
        values = (layout, *first, *second, self.background)
        return tuple(names.index(value) for names, value in zip(ATTRIBUTES.values(), values, strict=True))


def sample_scene(rng: random.Random) -> Scene:
    """A scene whose every word is drawn uniformly."""
    colors = tuple(COLORS)
    return Scene(
        rng.choice(colors),
        rng.choice(SHAPES),
        rng.choice(RELATIONS),
        rng.choice(colors),
        rng.choice(SHAPES),
        rng.choice(BACKGROUNDS),
    )


def parse_caption(caption: str) -> Scene:
    """The scene that a caption describes.

    Raises:
        ValueError: the caption is not of the one form that the model knows.
    """
    words = caption.lower().replace(" of ", " ").split()
    if len(words) == 11:
        relation = f"{words[3]} of" if words[3] in ("left", "right") else words[3]
        words = [words[1], words[2], relation, words[5], words[6], words[9]]
        scene = Scene(*words)
        fits = (
            {scene.color, scene.other_color} <= set(COLORS)
            and {scene.shape, scene.other_shape} <= set(SHAPES)
            and scene.relation in RELATIONS
            and scene.background in BACKGROUNDS
        )
        if fits and scene.caption() == " ".join(caption.lower().split()):
            return scene
    raise ValueError(f"caption {caption!r}: expected {SYNTAX}")


SYNTAX = (
    f"'a COLOR SHAPE RELATION a COLOR SHAPE on a BACKGROUND background' with colors {', '.join(COLORS)};"
    f" shapes {', '.join(SHAPES)}; relations {', '.join(RELATIONS)}; backgrounds {', '.join(BACKGROUNDS)}"
)


def render(attributes: Tensor, generator: torch.Generator) -> Tensor:
    """Draw scenes; positions, sizes, tints and pattern phases are random.

    Args:
        attributes: integer tensor (batch, 6), columns as in `ATTRIBUTES`.
        generator: source of the randomness, on the CPU.

    Returns:
        Float tensor (batch, 3, 32, 32) with values in [-1, 1].
    """
    batch = len(attributes)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(batch, *shape, generator=generator)

    axis = torch.arange(SIZE, dtype=torch.float32) + 0.5
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    picture = _background(attributes[:, 5], x, y, uniform)

    radius = uniform(4.2, 6.2, 2)
    near = uniform(0.0, 1.0) * 2.5 + radius[:, 0] + 1.0
    far = SIZE - 1.0 - radius[:, 1] - uniform(0.0, 1.0) * 2.5
    across = uniform(-4.0, 4.0, 2) + SIZE / 2
    horizontal = (attributes[:, 0] == 0)[:, None]
    along = torch.stack([near, far], 1)
    center_x = torch.where(horizontal, along, across)
    center_y = torch.where(horizontal, across, along)

    palette = torch.tensor(list(COLORS.values()))
    for index, (color, shape) in enumerate(((1, 2), (3, 4))):
        dx = (x - center_x[:, index, None, None]) / radius[:, index, None, None]
        dy = (y - center_y[:, index, None, None]) / radius[:, index, None, None]
        inside = -_signed_distance(attributes[:, shape], dx, dy) * radius[:, index, None, None]
        alpha = (inside / _ANTIALIAS + 0.5).clamp(0, 1)[:, None]
        tint = (palette[attributes[:, color]] + uniform(-0.05, 0.05, 3)).clamp(0, 1)
        picture = torch.lerp(picture, tint[:, :, None, None].expand_as(picture), alpha)
    return picture * 2 - 1


def _background(kind: Tensor, x: Tensor, y: Tensor, uniform: Callable[..., Tensor]) -> Tensor:
    """Grey level (batch, 3, 32, 32) in [0, 1] of the four kinds, chosen per picture."""
    phase = uniform(0.0, 8.0, 2)[:, :, None, None]
    stripes = torch.sin((x + y + phase[:, 0]) * (torch.pi / 4)) * 2
    checks = torch.sin((x + phase[:, 0]) * (torch.pi / 4)) * torch.sin((y + phase[:, 1]) * (torch.pi / 4)) * 4
    pattern = torch.stack([torch.full_like(stripes, -1.0), torch.ones_like(stripes), stripes, checks], 1)
    chosen = pattern[torch.arange(len(kind)), kind].clamp(-1, 1)[:, None]
    low, high = torch.tensor([0.10, 0.10, 0.36, 0.36])[kind], torch.tensor([0.88, 0.88, 0.64, 0.64])[kind]
    grey = torch.lerp(low[:, None, None, None], high[:, None, None, None], (chosen + 1) / 2)
    return (grey + uniform(-0.03, 0.03, 3)[:, :, None, None]).clamp(0, 1)


def _signed_distance(shape: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Signed distance to the outline of a shape of radius 1 (negative inside), chosen per picture."""
    r = (x * x + y * y).sqrt()
    box = torch.maximum(x.abs(), y.abs())
    cross = torch.minimum(
        torch.maximum(x.abs() - 1.0, y.abs() - 0.36),
        torch.maximum(x.abs() - 0.36, y.abs() - 1.0),
    )
    triangle = torch.maximum(y - 0.8, 0.87 * x.abs() - 0.5 * y - 0.5)
    ring = (r - 0.74).abs() - 0.26
    every = torch.stack([r - 1.0, box - 0.86, triangle, cross, ring, (x.abs() + y.abs() - 1.1) * 0.71], 1)
    return every[torch.arange(len(shape)), shape]
