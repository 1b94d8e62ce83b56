"""Fuse adapters (LoRA and others that `peft` puts into a module) before capturing."""

import contextlib
import copy
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import nn

from recache_compile.errors import CaptureError

ATTENTION_KWARGS = ("joint_attention_kwargs", "attention_kwargs", "cross_attention_kwargs")
"""Arguments of models in which pipelines hand on the strength of adapters, as "scale"."""


@contextlib.contextmanager
def fused_adapters(module: nn.Module, scale: float = 1.0) -> Iterator[None]:
    """Put plain layers, with the active adapters merged into their weights, in the place of adapted ones.

    The module's own layers are neither changed nor lost: they are back afterwards.  What is
    captured meanwhile has the names of the plain module, so that `Compiled.refit` takes a
    plain state dict.

    Args:
        module: with or without adapters.
        scale: strength of all of them, in addition to that which they have.
    """
    adapted = {
        name: child
        for name, child in module.named_modules()
        if hasattr(child, "base_layer") and callable(getattr(child, "merge", None))
    }
    try:
        for name, layer in adapted.items():
            module.set_submodule(name, _merged(layer, scale))
        yield
    finally:
        for name, layer in adapted.items():
            module.set_submodule(name, layer)


def _merged(layer: nn.Module, scale: float) -> nn.Module:
    """The base layer of a copy into which the active adapters are merged."""
    fused: Any = copy.deepcopy(layer)
    if scale != 1.0:
        fused.scale_layer(scale)
    if not getattr(fused, "disable_adapters", False):
        fused.merge()
    base = fused.base_layer
    assert isinstance(base, nn.Module)
    return base


def adapter_scale(calls: Iterable[Mapping[str, Any]]) -> float:
    """The strength of adapters that calls ask for, as the pipelines of `diffusers` pass it.

    Args:
        calls: arguments of the model, for each kind of call.

    Raises:
        CaptureError: they ask for several, which one set of weights cannot have.
    """
    found = {
        float(kwargs.get("scale", 1.0))
        for arguments in calls
        for name in ATTENTION_KWARGS
        if isinstance(kwargs := arguments.get(name), Mapping)
    } or {1.0}
    if len(found) > 1:
        raise CaptureError(
            f"adapters: the calls ask for the strengths {', '.join(map(str, sorted(found)))}; compile one at a time"
        )
    return found.pop()
