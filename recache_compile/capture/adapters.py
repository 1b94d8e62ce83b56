"""Fuse adapters (LoRA and its kin, as `peft` puts them into a module) before capturing."""

import contextlib
import copy
from collections.abc import Iterator

from torch import nn


@contextlib.contextmanager
def fused_adapters(module: nn.Module) -> Iterator[None]:
    """Put plain layers, with the active adapters merged into their weights, in the place of adapted ones.

    The module's own layers are neither changed nor lost: they are back afterwards.  What is
    captured meanwhile has the names of the plain module, so that `Compiled.refit` takes a
    plain state dict.
    """
    adapted = {
        name: child
        for name, child in module.named_modules()
        if hasattr(child, "base_layer") and callable(getattr(child, "merge", None))
    }
    try:
        for name, layer in adapted.items():
            module.set_submodule(name, _merged(layer))
        yield
    finally:
        for name, layer in adapted.items():
            module.set_submodule(name, layer)


def _merged(layer: nn.Module) -> nn.Module:
    """The base layer of a copy into which the active adapters are merged."""
    fused = copy.deepcopy(layer)
    if not getattr(fused, "disable_adapters", False):
        fused.merge()  # type: ignore[operator]
    base = fused.base_layer
    assert isinstance(base, nn.Module)
    return base
