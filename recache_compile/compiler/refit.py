"""New values for the weights that engines share."""

import hashlib
from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from recache_compile.errors import ModelError
from recache_compile.ir.program import dtype_name


def replace_weights(
    weights: Mapping[str, Tensor],
    names_of_module: Collection[str],
    unread: Mapping[str, str],
    tied: Mapping[str, str],
    state_dict: Mapping[str, Tensor],
    strict: bool,
) -> None:
    """Write new values into weights, all of them or none.

    Args:
        weights: that programs read, by name.
        names_of_module: of the module's parameters and stored buffers.
        unread: hash, at the time of compiling, of those that no program reads.
        tied: second names of weights, and the names by which programs read them.
        state_dict: the new values; cast to the dtype that is there.
        strict: expect every weight of the module.

    Raises:
        ModelError: a weight is missing, unknown, of another shape, has two values under two names,
            or is a new value of one that no engine reads; nothing has changed then.
    """
    if not isinstance(state_dict, Mapping):
        raise ModelError(f"refit: expected a state dict, got {type(state_dict).__name__}; nothing was changed")
    split = sorted(
        name
        for name, first in tied.items()
        if name in state_dict
        and first in state_dict
        and hash_of_weight(state_dict[name]) != hash_of_weight(state_dict[first])
    )
    state_dict = {tied.get(name, name): value for name, value in state_dict.items()}
    known = set(weights) & set(names_of_module)
    unknown = sorted(set(state_dict) - set(names_of_module))
    missing = sorted(known - set(state_dict)) if strict else []
    shapes = [
        f"{name} is {list(state_dict[name].shape)}, compiled {list(weights[name].shape)}"
        for name in sorted(known & set(state_dict))
        if isinstance(state_dict[name], Tensor) and state_dict[name].shape != weights[name].shape
    ]
    unusable = sorted(name for name in known & set(state_dict) if not _is_usable(state_dict[name]))
    lost = sorted(
        name
        for name in set(state_dict) & set(unread)
        if hash_of_weight(state_dict[name], unread[name].partition(":")[0]) != unread[name]
    )
    wrong = {
        "unknown": unknown,
        "missing": missing,
        "of another shape": shapes,
        "no dense tensor": unusable,
        "not equal to what they are tied to": split,
        "read by no engine": lost,
    }
    for what, names in wrong.items():
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            remedy = f" (they read {', '.join(sorted(known)[:3])} ...; leave the others out)" if names is lost else ""
            raise ModelError(f"refit: {what}: {', '.join(names[:3])}{more}{remedy}; nothing was changed")
    for name in known & set(state_dict):
        with torch.no_grad(), torch.inference_mode(weights[name].is_inference()):  # whatever mode the caller is in
            weights[name].copy_(state_dict[name])


def tied_weights(module: nn.Module) -> dict[str, str]:
    """The names of parameters and buffers that are another one too, and the first name of that."""
    named = (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False))
    first: dict[int, str] = {}
    for name, weight in named:
        first.setdefault(id(weight), name)
    return {name: first[id(weight)] for name, weight in named if first[id(weight)] != name}


def _is_usable(value: object) -> bool:
    """Whether a weight can be taken from here: a dense tensor of numbers that has values."""
    return isinstance(value, Tensor) and value.layout is torch.strided and not value.is_meta and not value.is_complex()


def hash_of_weight(weight: object, dtype: str = "") -> str:
    """SHA-256 of a weight's values, as "DTYPE:HASH"; "" of what is no weight.

    Args:
        weight: the tensor.
        dtype: to cast to before; by default its own.
    """
    if not _is_usable(weight):
        return ""
    assert isinstance(weight, Tensor)
    values = weight.detach().to("cpu", getattr(torch, dtype) if dtype else weight.dtype).contiguous()
    digest = hashlib.sha256(values.reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
    return f"{dtype_name(values.dtype)}:{digest}"
