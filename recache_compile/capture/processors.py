"""Attention processors that a pipeline sets for a call, as perturbed-attention guidance does.

They change what a module computes without any argument that tells so: calls under other
processors are a kind of their own, known by one more constant, `PROCESSORS`.
"""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

PROCESSORS = "attn_processors"
"""Name of the constant that tells which processors a call has; absent where they are those of the module at rest."""


def processors_of(module: nn.Module | None) -> dict[str, Any]:
    """The attention processors of a module of diffusers, by name; none of other modules."""
    return dict(getattr(module, PROCESSORS, {}))


def processors_text(now: Mapping[str, Any], at_rest: Mapping[str, Any]) -> str:
    """Which processors are other objects than at rest, and of which class; "" where none is."""
    changed = {name: each for name, each in now.items() if at_rest.get(name) is not each}
    return ", ".join(f"{name.removesuffix('.processor')}: {type(each).__name__}" for name, each in changed.items())


@contextlib.contextmanager
def under_processors(module: Any, processors: Mapping[str, Any]) -> Iterator[None]:
    """Let a module have other attention processors for a while; none: its own."""
    before = processors_of(module)
    try:
        if processors:
            module.set_attn_processor(dict(processors))
        yield
    finally:
        if processors:
            module.set_attn_processor(before)
