"""Captions to look for schedules with, where the user gives none."""

import random
from pathlib import Path
from typing import Any

from recache_compile.errors import ModelError

GENERAL = (
    "a photo of a cat in a garden", "a red bicycle leaning against a brick wall", "a bowl of fruit on a wooden table",
    "an astronaut riding a horse on the moon", "a city street at night in the rain", "a lighthouse on a cliff at sunset",
    "a portrait of an old fisherman, oil painting", "a glass of water with ice on a marble counter",
    "a snow-covered mountain reflected in a lake", "a steam train crossing a stone bridge",
    "two children building a sandcastle", "a close-up of a bee on a sunflower", "a cup of coffee beside an open book",
    "a futuristic car in a desert", "a dog catching a frisbee in a park", "a bakery window full of bread",
    "a sailing boat in a storm, watercolour", "a hand holding a paper map", "an owl on a branch in the fog",
    "a chess game between two robots", "a field of lavender under a blue sky", "a busy market with colourful umbrellas",
    "a violin on a velvet chair", "a sign that reads OPEN on a shop door",
)  # fmt: skip
"""Twenty-four captions of many kinds."""

BY_PIPELINE = {
    "ShapesPipeline": (
        "a red circle left of a blue square on a dark background",
        "a yellow triangle above a magenta ring on a checkered background",
        "a green cross right of a cyan diamond on a striped background",
        "a blue ring below a yellow square on a light background",
    )
}
"""Captions that pipelines of these classes understand."""


def training_and_held_out(model: str, file: Path | None) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Captions to choose schedules on, and others to judge them on.

    Args:
        model: what the user wrote; the embedded model knows one kind of sentence only.
        file: one caption a line; every fourth is held out.  Without one, captions of our own.

    Raises:
        ModelError: the file cannot be read or has fewer than two captions.
    """
    if file is None and model == "shapes":
        captions = _of_shapes()
        return captions[: len(captions) // 2], captions[len(captions) // 2 :]
    captions = GENERAL if file is None else _read(file)
    if len(captions) < 2:
        raise ModelError(f"prompts {file}: {len(captions)} captions; give at least two, one a line")
    held_out = captions[3::4] or captions[-1:]
    return tuple(text for text in captions if text not in held_out), held_out


def captions_for(pipeline: Any) -> tuple[str, ...]:
    """Captions to compare and to calibrate with, where the user gives none."""
    return BY_PIPELINE.get(type(pipeline).__name__, ("a photo of a cat in a garden",))


def captions_of(model: str, file: Path | None) -> tuple[str, ...]:
    """Captions to judge a model on: those of a file, or our own (of shapes, those that `train` holds out).

    Raises:
        ModelError: the file cannot be read or has none.
    """
    if file is None:
        return training_and_held_out(model, None)[1] if model == "shapes" else GENERAL
    captions = _read(file)
    if not captions:
        raise ModelError(f"prompts {file}: no captions; give at least one, one a line")
    if model == "shapes":
        from recache_compile.models.shapes.scenes import parse_caption

        for caption in captions:
            try:
                parse_caption(caption)
            except ValueError as error:
                raise ModelError(f"prompts {file}: {error}") from None
    return captions


def _of_shapes() -> tuple[str, ...]:
    """Different sentences that the embedded model knows."""
    from recache_compile.models.shapes.scenes import sample_scene

    rng = random.Random(20_260)
    return tuple(dict.fromkeys(sample_scene(rng).caption() for _ in range(2048)))


def _read(file: Path) -> tuple[str, ...]:
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"prompts {file}: cannot be read ({error}); give a text file, one caption a line") from None
    return tuple(dict.fromkeys(line.strip() for line in lines if line.strip()))
