"""Which calls engines were compiled for, and of which kind a call is."""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from recache_compile.errors import MismatchError
from recache_compile.ir.signature import Signature, call_kind, is_flat, named_leaves
from recache_compile.ir.value import Value
from recache_compile.runtimes.base import Variant


@dataclass(frozen=True, slots=True)
class LastCall:
    """The last call of a branch: one that differs in the values of its tensors alone need not be looked at anew.

    Args:
        key: kind of the call.
        tensors: shape and type of the tensors, by name.
        others: the other arguments.
    """

    key: Hashable
    tensors: Mapping[str, tuple[torch.Size, torch.dtype]]
    others: Mapping[str, Any]

    def resembles(self, arguments: Mapping[str, Any], device: torch.device) -> bool:
        """Whether a call is of the same kind, its tensors on this device."""
        if len(arguments) != len(self.tensors) + len(self.others):
            return False
        for name, value in arguments.items():
            if name in self.tensors:
                if not isinstance(value, Tensor) or value.device != device:
                    return False
                if (value.shape, value.dtype) != self.tensors[name]:
                    return False
            elif name not in self.others or (value is not self.others[name] and repr(value) != repr(self.others[name])):
                return False
        return True


class KnownCalls:
    """The kinds of calls that engines were compiled for.

    Args:
        variants: programs and engines, one for each set of input shapes.
        signature: how the model is called.
    """

    def __init__(self, variants: Sequence[Variant], signature: Signature) -> None:
        self._signature = signature
        self._device = variants[0].device
        self._variants: dict[Hashable, list[Variant]] = {}
        for each in variants:
            kind = call_kind(_tensor_inputs(each), dict(each.constants))
            self._variants.setdefault(kind, []).append(each)
        self._last: dict[str, LastCall] = {}

    def variants(self, key: Hashable) -> Sequence[Variant]:
        """Those of one kind, which differ in the values that they were compiled for."""
        return self._variants[key]

    def look_at(self, branch: str, arguments: Mapping[str, Any]) -> tuple[dict[str, Tensor], Hashable]:
        """The tensors of a call by name, and its kind.

        Args:
            branch: guidance branch, whose last call is remembered.
            arguments: of the call.

        Raises:
            MismatchError: nothing was compiled for it, or a tensor is elsewhere.
        """
        last = self._last.get(branch)
        if last is not None and last.resembles(arguments, self._device):
            return {name: arguments[name] for name in last.tensors}, last.key
        leaves = named_leaves(arguments)
        tensors = {name: leaf for name, leaf in leaves.items() if isinstance(leaf, Tensor)}
        constants = self._signature.constants(arguments, leaves)
        for name, tensor in tensors.items():
            if tensor.device != self._device:
                raise MismatchError(f"input {name!r} is on {tensor.device}, the engines are on {self._device}; move it")
        key = call_kind(tensors, constants)
        if key not in self._variants:
            raise MismatchError(self._no_variant(tensors, constants))
        self._last.pop(branch, None)
        if is_flat(arguments):
            others = {name: value for name, value in arguments.items() if name not in tensors}
            facts = {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
            self._last[branch] = LastCall(key, facts, others)
        return tensors, key

    def _no_variant(self, tensors: Mapping[str, Tensor], constants: Mapping[str, str]) -> str:
        given = {**constants, **{name: _describe(leaf) for name, leaf in tensors.items()}}
        compiled = [
            dict(each.constants) | {name: _describe(value) for name, value in _tensor_inputs(each).items()}
            for (each, *_) in self._variants.values()
        ]

        def differences(facts: Mapping[str, str]) -> list[str]:
            return [name for name in {**given, **facts} if facts.get(name) != given.get(name)]

        nearest = min(compiled, key=lambda facts: len(differences(facts)))
        wrong = [
            f"{name} is {given.get(name, 'missing')}, compiled {nearest.get(name, 'without')}"
            for name in differences(nearest)
        ]
        return f"no engine for these inputs: {'; '.join(wrong)}; compile for them too"


def _tensor_inputs(variant: Variant) -> dict[str, Tensor | Value]:
    """What has the shape and type of each tensor input."""
    return {**variant.fixed, **{value.name: value for value in variant.inputs}}


def _describe(value: Tensor | Value) -> str:
    return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
