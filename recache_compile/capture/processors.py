"""Attention processors that a pipeline sets for a call, as perturbed-attention guidance does.

They change what a module computes without any argument that tells so: calls under other
processors are a kind of their own, known by one more constant, `PROCESSORS`.
"""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from recache_compile.errors import CaptureError

PROCESSORS = "attn_processors"
"""Name of the constant that tells which processors a call has; absent where they are those of the module at rest."""

_PLAIN = (bool, int, float, str, type(None))


def processors_of(module: nn.Module | None) -> dict[str, Any]:
    """The attention processors of a module of diffusers, by name; none of other modules."""
    return dict(getattr(module, PROCESSORS, {}))


def processors_text(now: Mapping[str, Any], at_rest: Mapping[str, Any]) -> str:
    """Which processors are other objects than at rest, of which class and with which state; "" where none is.

    Raises:
        CaptureError: one holds more than numbers and text, so that two of them cannot be told apart.
    """
    changed = {name: each for name, each in now.items() if at_rest.get(name) is not each}
    return ", ".join(f"{name.removesuffix('.processor')}: {_text(each)}" for name, each in changed.items())


def _text(processor: Any) -> str:
    state = vars(processor)
    if unknown := [name for name, value in state.items() if not isinstance(value, _PLAIN)]:
        raise CaptureError(
            f"attention processor {type(processor).__name__}: its {unknown[0]} is neither a number nor text, so engines"
            " cannot be told apart by it; compile and call without this processor"
        )
    settings = ", ".join(f"{name}={value!r}" for name, value in sorted(state.items()))
    return f"{type(processor).__module__}.{type(processor).__qualname__}({settings})"


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
