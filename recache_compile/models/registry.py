"""The models that ship with the package: one entry each, and all that other files know about them.

Importing this file imports no model: the code of one (`EmbeddedCode`) is loaded when it is first needed.
A new model takes a folder beside `shapes` whose module `embedded` offers `EmbeddedCode`, an entry in
`EMBEDDED`, and its packages and files in `pyproject.toml`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from torch import Tensor

_HERE = Path(__file__).parent


@dataclass(frozen=True, slots=True)
class OwnJudge:
    """A way to judge results that only one embedded model has.

    Args:
        name: the user's and the tables' word for it.
        kind: "distance" to the uncached result (lower is better), or "reward" for showing the prompt (higher is).
        unit: beside its values, for people.
        counts: whether the project's target is about it: at most 1 % worse than uncached.
        title: what it is.
    """

    name: str
    kind: Literal["distance", "reward"]
    unit: str
    counts: bool
    title: str


class EmbeddedCode(Protocol):
    """What the module of an embedded model offers; pictures are (batch, 3, H, W) with values in [0, 1]."""

    PICTURE_SIZE: int
    """Pixels of a side of what the model draws."""

    def pipeline_class(self) -> Any:
        """The class of its `diffusers` pipeline."""

    def captions(self) -> tuple[str, ...]:
        """Different captions that the model can draw, the same ones every time."""

    def check_caption(self, caption: str) -> None:
        """Raise `ValueError` unless the model can draw a caption."""

    def distance(self, name: str) -> Callable[[Tensor, Tensor], Tensor]:
        """One of its own distances, from pictures and reference to (batch,)."""

    def reward(self, name: str) -> Callable[[Tensor, Sequence[str]], Tensor]:
        """One of its own rewards, from pictures and captions to (batch,)."""

    def features(self) -> Callable[[Tensor], Tensor]:
        """What Frechet distances are taken of, from pictures to (batch, features)."""

    def reference_features(self, captions: Sequence[str]) -> Tensor:
        """Those features of what the model should draw, (pictures, features); the captions are taken in turn."""


@dataclass(frozen=True, slots=True)
class EmbeddedModel:
    """What the package knows about one of its models.

    Args:
        name: what users write.
        pipeline: name of its pipeline's class.
        weights: folder of its pipeline.
        policies: folder of its trained policies, FORECASTER-ORDER each.
        captions: to compare and to calibrate with, where the user gives none.
        judges: its own.
        distance: of these, or another, what "auto" stands for.
        metrics: those that it is evaluated by where the user names none.
        features: what its Frechet distances are taken of, for people.
        reference: what the reference set of these distances is, for people.
        batch_size: samples that an evaluation runs together where the user does not say.
        code: loads its code.
    """

    name: str
    pipeline: str
    weights: Path
    policies: Path
    captions: tuple[str, ...]
    judges: tuple[OwnJudge, ...]
    distance: str
    metrics: tuple[str, ...]
    features: str
    reference: str
    batch_size: int
    code: Callable[[], EmbeddedCode]

    def own(self, kind: Literal["distance", "reward"]) -> tuple[str, ...]:
        """Names of its own judges of one kind."""
        return tuple(judge.name for judge in self.judges if judge.kind == kind)


def find(model: str) -> EmbeddedModel | None:
    """The embedded model of this name."""
    return EMBEDDED.get(model)


def find_pipeline(name: str) -> EmbeddedModel | None:
    """The embedded model whose pipeline is of the class of this name."""
    return next((each for each in EMBEDDED.values() if each.pipeline == name), None)


def owner_of(judge: str) -> EmbeddedModel | None:
    """The embedded model that has a judge of this name for itself."""
    return next((each for each in EMBEDDED.values() if judge in {own.name for own in each.judges}), None)


def _shapes() -> EmbeddedCode:
    from recache_compile.models.shapes import embedded

    return embedded


EMBEDDED = {
    each.name: each
    for each in (
        EmbeddedModel(
            name="shapes",
            pipeline="ShapesPipeline",
            weights=_HERE / "shapes" / "weights",
            policies=_HERE / "shapes" / "policies",
            captions=(
                "a red circle left of a blue square on a dark background",
                "a yellow triangle above a magenta ring on a checkered background",
                "a green cross right of a cyan diamond on a striped background",
                "a blue ring below a yellow square on a light background",
            ),
            judges=(
                OwnJudge("features", "distance", "", False, "distance of the shipped classifier's features, as LPIPS"),
                OwnJudge(
                    "caption", "reward", "nats", False, "log-probability of the caption under the shipped classifier"
                ),
                OwnJudge(
                    "attributes", "reward", "%", True, "share of the caption's attributes that the classifier reads"
                ),
            ),
            distance="features",
            metrics=("psnr", "ssim", "features", "attributes", "fid"),
            features="features of the shipped classifier",
            reference="rendered scenes of the same captions",
            batch_size=16,
            code=_shapes,
        ),
    )
}
"""By name."""
