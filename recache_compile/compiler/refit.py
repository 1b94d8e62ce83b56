"""New values for the weights that engines share."""

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from recache_compile.errors import ModelError


def replace_weights(
    weights: Mapping[str, Tensor], names_of_module: Collection[str], state_dict: Mapping[str, Tensor], strict: bool
) -> None:
    """Write new values into weights, all of them or none.

    Args:
        weights: that programs read, by name.
        names_of_module: of the module's parameters and stored buffers.
        state_dict: the new values; cast to the dtype that is there.
        strict: expect every weight of the module.

    Raises:
        ModelError: a weight is missing, unknown or of another shape; nothing has changed then.
    """
    if not isinstance(state_dict, Mapping):
        raise ModelError(f"refit: expected a state dict, got {type(state_dict).__name__}; nothing was changed")
    known = set(weights) & set(names_of_module)
    unknown = sorted(set(state_dict) - set(names_of_module))
    missing = sorted(known - set(state_dict)) if strict else []
    shapes = [
        f"{name} is {list(state_dict[name].shape)}, compiled {list(weights[name].shape)}"
        for name in sorted(known & set(state_dict))
        if isinstance(state_dict[name], Tensor) and state_dict[name].shape != weights[name].shape
    ]
    unusable = sorted(name for name in known & set(state_dict) if not _is_usable(state_dict[name]))
    wrong = {"unknown": unknown, "missing": missing, "of another shape": shapes, "no dense tensor": unusable}
    for what, names in wrong.items():
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise ModelError(f"refit: {what}: {', '.join(names[:3])}{more}; nothing was changed")
    for name in known & set(state_dict):
        weights[name].copy_(state_dict[name])


def _is_usable(value: object) -> bool:
    """Whether a weight can be taken from here: a dense tensor of numbers that has values."""
    return isinstance(value, Tensor) and value.layout is torch.strided and not value.is_meta and not value.is_complex()
