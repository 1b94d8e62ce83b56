"""Captions to look for schedules with, where the user gives none."""

from pathlib import Path
from typing import Any

from recache_compile.errors import ModelError
from recache_compile.models.registry import EmbeddedModel, find, find_pipeline

GENERAL = (
    "a photo of a cat in a garden", "a red bicycle leaning against a brick wall", "a bowl of fruit on a wooden table",
    "an astronaut riding a horse on the moon", "a city street at night in the rain",
    "a lighthouse on a cliff at sunset",
    "a portrait of an old fisherman, oil painting", "a glass of water with ice on a marble counter",
    "a snow-covered mountain reflected in a lake", "a steam train crossing a stone bridge",
    "two children building a sandcastle", "a close-up of a bee on a sunflower", "a cup of coffee beside an open book",
    "a futuristic car in a desert", "a dog catching a frisbee in a park", "a bakery window full of bread",
    "a sailing boat in a storm, watercolour", "a hand holding a paper map", "an owl on a branch in the fog",
    "a chess game between two robots", "a field of lavender under a blue sky", "a busy market with colourful umbrellas",
    "a violin on a velvet chair", "a sign that reads OPEN on a shop door",
)  # fmt: skip
"""Twenty-four captions of many kinds."""


def training_and_held_out(model: str, file: Path | None) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Captions to choose schedules on, and others to judge them on.

    Args:
        model: what the user wrote; an embedded model may know one kind of sentence only.
        file: one caption a line; every fourth is held out.  Without one, captions of our own.

    Raises:
        ModelError: the file cannot be read or has fewer than two captions.
    """
    embedded = find(model)
    if file is None and embedded is not None:
        captions = embedded.code().captions()
        return captions[: len(captions) // 2], captions[len(captions) // 2 :]
    captions = GENERAL if file is None else _read(file)
    if len(captions) < 2:
        raise ModelError(f"prompts {file}: {len(captions)} captions; give at least two, one a line")
    held_out = captions[3::4] or captions[-1:]
    return tuple(text for text in captions if text not in held_out), held_out


def captions_for(pipeline: Any) -> tuple[str, ...]:
    """Captions to compare and to calibrate with, where the user gives none."""
    embedded = find_pipeline(type(pipeline).__name__)
    return GENERAL[:1] if embedded is None else embedded.captions


def captions_of(model: str, file: Path | None) -> tuple[str, ...]:
    """Captions to judge a model on: those of a file, or our own (of an embedded model, those that `train` holds out).

    Raises:
        ModelError: the file cannot be read or has none.
    """
    embedded = find(model)
    if file is None:
        return GENERAL if embedded is None else training_and_held_out(model, None)[1]
    captions = _read(file)
    if not captions:
        raise ModelError(f"prompts {file}: no captions; give at least one, one a line")
    if embedded is not None:
        _check(embedded, captions, file)
    return captions


def _check(embedded: EmbeddedModel, captions: tuple[str, ...], file: Path) -> None:
    """Raise `ModelError` unless an embedded model can draw every caption of a file."""
    check_caption = embedded.code().check_caption
    for caption in captions:
        try:
            check_caption(caption)
        except ValueError as error:
            raise ModelError(f"prompts {file}: {error}") from None


def _read(file: Path) -> tuple[str, ...]:
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"prompts {file}: cannot be read ({error}); give a text file, one caption a line") from None
    return tuple(dict.fromkeys(line.strip() for line in lines if line.strip()))
