"""Calls of a pipeline that differ in what is to stay free: engines are built from them."""

import inspect
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from recache_compile.config import CompileConfig
from recache_compile.errors import ModelError

FREE = ("text", "size", "batch")
"""What can be free: the length of the prompt, height and width, the number of pictures."""

STEP = 64
"""Pixels that another picture is larger: a multiple of all patches."""

PROMPTS = (
    "a red cube",
    "a red cube on top of a blue ball, in front of a green wall, late in the evening, oil on canvas",
)
"""A short one and a long one."""

BATCHES = (1, 2, 3)
"""Of more than one picture, any number: one is a kind of its own."""


def check_wishes(free: Sequence[str], config: CompileConfig) -> None:
    """Raise `ModelError` where something cannot be free, or not with these choices."""
    if wrong := [each for each in free if each not in FREE]:
        raise ModelError(f"free {wrong[0]!r}: choose from {', '.join(FREE)}")
    if free and not config.free_sizes:
        raise ModelError(f"free {', '.join(free)}: not together with fixed sizes; leave one of them out")
    if free and config.cuda_graphs:
        raise ModelError(f"free {', '.join(free)}: CUDA graphs replay calls of one size; leave one of them out")


def varied(pipeline: Any, call: Mapping[str, Any], free: Sequence[str]) -> list[dict[str, Any]]:
    """A call of a pipeline, and others that differ from it in what is to be free.

    Args:
        pipeline: a `diffusers` pipeline.
        call: arguments of the call, at whose sizes engines are tried.
        free: of `FREE`.

    Raises:
        ModelError: the pipeline takes no such arguments, or the call has values in their place.
    """
    accepted = inspect.signature(type(pipeline).__call__).parameters
    first, second = dict(call), dict(call)
    if "text" in free:
        short, long = _texts(pipeline, call, accepted)
        first |= {"prompt": short}
        second |= {"prompt": long}
    if "size" in free:
        height, width = _size(pipeline, call, accepted)
        first |= {"height": height, "width": width}
        second |= {"height": height + STEP, "width": width + 2 * STEP}
    if "batch" not in free:
        return [first, second]
    name = next((each for each in ("num_images_per_prompt", "num_videos_per_prompt") if each in accepted), None)
    if name is None:
        raise ModelError(
            f"free batch: {type(pipeline).__name__} makes one picture a prompt; compile for lists of prompts"
        )
    if name in call:
        raise ModelError(f"free batch: the call has {name}; leave it out")
    return [{**each, name: number} for each, number in itertools.product([first, second], BATCHES)]


def _texts(pipeline: Any, call: Mapping[str, Any], accepted: Mapping[str, Any]) -> tuple[str, str]:
    given = [name for name in call if name.startswith("prompt") and name != "prompt"]
    if "prompt" not in accepted or given:
        raise ModelError(
            f"free text: {type(pipeline).__name__} is called with {given[0] if given else 'no prompt'}; give calls with"
            " two lengths of it instead"
        )
    prompt = call.get("prompt", PROMPTS[0])
    if not isinstance(prompt, str):
        raise ModelError(f"free text: the prompt is {prompt!r:.40}; give one prompt, or calls with two lengths of it")
    return prompt, f"{prompt}, {PROMPTS[1]}"


def _size(pipeline: Any, call: Mapping[str, Any], accepted: Mapping[str, Any]) -> tuple[int, int]:
    if not {"height", "width"} <= set(accepted):
        raise ModelError(f"free size: {type(pipeline).__name__} takes no height and width")
    usual = {name: call.get(name, accepted[name].default) for name in ("height", "width")}
    if all(isinstance(each, int) for each in usual.values()):
        return usual["height"], usual["width"]
    latents, scale = getattr(pipeline, "default_sample_size", None), getattr(pipeline, "vae_scale_factor", None)
    if not (isinstance(latents, int) and isinstance(scale, int)):
        raise ModelError(f"free size: {type(pipeline).__name__} does not tell its usual size; name one (--size)")
    return call.get("height", latents * scale), call.get("width", latents * scale)
