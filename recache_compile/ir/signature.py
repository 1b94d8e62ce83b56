"""How a model is called, whatever the shapes, and how its arguments are named."""

import re
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

_PLAIN = (Tensor, int, float, str, type(None))
"""Types of arguments that hold nothing."""


@dataclass(frozen=True, slots=True)
class Signature:
    """How the model is called, whatever the shapes.

    Args:
        parameters: names of the parameters of the module's `forward`, in order.
        defaults: default of every parameter that has one, as text.
        result: `torch.utils._pytree` specification of the result, as JSON.
        tensors: which leaves of the result are tensors; the others are None.
    """

    parameters: tuple[str, ...]
    defaults: tuple[tuple[str, str], ...]
    result: str
    tensors: tuple[bool, ...]

    def constants(self, arguments: Mapping[str, Any], leaves: Mapping[str, Any]) -> dict[str, str]:
        """What is no tensor in a call, as text, defaults filled in.

        Args:
            arguments: of the call.
            leaves: of the arguments, by dotted name.
        """
        given = {name: repr(leaf) for name, leaf in leaves.items() if not isinstance(leaf, Tensor)}
        given |= {
            name: repr(value)
            for name, value in arguments.items()
            if isinstance(value, (list, tuple, dict)) and not value
        }
        top = {name.partition(".")[0] for name in (*leaves, *given)}
        filled = {name: default for name, default in self.defaults if name not in top} | given
        filled.pop("return_dict", None)
        return filled


MOST = 1 << 20
"""The largest number that can be a size; seeds are larger."""


def is_number(leaf: Any) -> bool:
    """Whether a leaf is a whole number that may be a size; 0 and 1 mean other things."""
    return isinstance(leaf, int) and not isinstance(leaf, bool) and 1 < leaf <= MOST


def number_as_shape(number: int, device: torch.device | None = None) -> Tensor:
    """A tensor (number,) of bytes, whose values do not matter: programs take numbers that are sizes so."""
    return torch.empty(number, dtype=torch.uint8, device=device)


def call_kind(leaves: Mapping[str, Any], constants: Mapping[str, str] | None = None) -> Hashable:
    """What all calls of one kind have in common: shape and type of every tensor, and the constants as text.

    Args:
        leaves: of the arguments, by dotted name: tensors, or `Value`s that describe them.
        constants: the other arguments, where defaults are filled in or the leaves are values
            only, see `Signature.constants`; None: the leaves that are no tensors.
    """
    if constants is None:
        constants = {name: repr(leaf) for name, leaf in leaves.items() if not isinstance(leaf, Tensor)}
    tensors = frozenset((name, tuple(leaf.shape), leaf.dtype) for name, leaf in leaves.items() if name not in constants)
    return tensors, frozenset(constants.items())


def named_leaves(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Leaves of nested arguments by dotted name, in `torch.export`'s order; those of an object are its attributes."""
    if is_flat(arguments):
        return dict(arguments)
    flat, _ = pytree.tree_flatten_with_path(dict(arguments))
    leaves: dict[str, Any] = {}
    for path, leaf in flat:
        inner = named_leaves(dict(sorted(vars(leaf).items()))) if _holds_attributes(leaf) else {"": leaf}
        leaves |= {f"{dotted_name(path)}.{name}".removesuffix("."): value for name, value in inner.items()}
    return leaves


def is_flat(arguments: Mapping[str, Any]) -> bool:
    """Whether no argument holds others: each is a leaf."""
    return all(isinstance(value, _PLAIN) for value in arguments.values())


def _holds_attributes(value: Any) -> bool:
    return hasattr(value, "__dict__") and not isinstance(value, (*_PLAIN, nn.Module, Enum)) and not callable(value)


def open_objects(arguments: Mapping[str, Any]) -> None:
    """Let `torch.export` look into the objects among the arguments (key-value caches, say), as `named_leaves` does."""
    pending: list[Any] = [dict(arguments)]
    while pending:
        for leaf in pytree.tree_leaves(pending.pop()):
            if _holds_attributes(leaf):
                if type(leaf) not in pytree.SUPPORTED_NODES:
                    _register(type(leaf))
                pending.append(leaf)


def _register(cls: type) -> None:
    """Flatten the instances of a class into their attributes, by name."""

    def flatten_attributes(instance: Any) -> tuple[list[Any], tuple[str, ...]]:
        names = tuple(sorted(vars(instance)))
        return [vars(instance)[name] for name in names], names

    def flatten_with_keys(instance: Any) -> tuple[list[Any], tuple[str, ...]]:
        values, names = flatten_attributes(instance)
        return [(pytree.GetAttrKey(name), value) for name, value in zip(names, values, strict=True)], names

    def unflatten(values: Any, names: Any) -> Any:
        instance: Any = object.__new__(cls)
        vars(instance).update(zip(names, values, strict=True))
        return instance

    pytree.register_pytree_node(cls, flatten_attributes, unflatten, flatten_with_keys_fn=flatten_with_keys)


def dotted_name(path: Any) -> str:
    """Name of a leaf ("x.0", "kwargs.scale") from its path."""
    return ".".join(re.sub(r"[\[\]'\"]", "", str(key)).strip(".") for key in path)
