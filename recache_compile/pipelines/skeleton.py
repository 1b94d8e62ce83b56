"""A transformer without its weights, for pipelines that read more of it than its configuration."""

import contextlib
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from recache_compile.artifact.specs import transformer_class
from recache_compile.compiler.compiled import Description
from recache_compile.errors import ModelError

_PATCHING = threading.Lock()
"""One thread at a time changes how modules register parameters."""


def skeleton_of(description: Description, weights: Mapping[str, Tensor]) -> nn.Module | None:
    """The module that was compiled, made of its configuration; its weights are on the meta device.

    Buffers are made as the constructor does.  Weights that the engines have are shared where
    the module has them too.

    Args:
        description: of what was compiled.
        weights: of the engines, by name.

    Returns:
        None where `diffusers` has no such class, or it does not take the configuration.
    """
    name = description.model_class.rpartition(".")[2]
    try:
        kind: Any = transformer_class(name)
        with _parameters_on_meta(), torch.random.fork_rng():
            module: nn.Module = kind.from_config(dict(description.model_config)).eval()
    except (ModelError, TypeError, ValueError, AttributeError):
        return None
    own = module.state_dict()
    shared = {each: weight for each, weight in weights.items() if each in own and own[each].shape == weight.shape}
    module.load_state_dict(shared, strict=False, assign=True)
    return module.requires_grad_(False)


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Constructors register parameters without memory, and buffers as they are."""
    own = threading.get_ident()

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and threading.get_ident() == own:  # other threads make modules of their own
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=False)
        register(module, name, parameter)

    with _PATCHING:
        register = nn.Module.register_parameter
        nn.Module.register_parameter = on_meta  # type: ignore[method-assign, assignment]
        try:
            yield
        finally:
            nn.Module.register_parameter = register  # type: ignore[method-assign]
