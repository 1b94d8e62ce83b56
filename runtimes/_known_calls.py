"""Which calls engines were compiled for, and of which kind a call is."""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from recache_compile.errors import MismatchError
from recache_compile.ir.signature import Signature, call_kind, is_flat, is_number, named_leaves, number_as_shape
from recache_compile.ir.value import Kind, Value
from recache_compile.runtimes.base import Variant


@dataclass(frozen=True, slots=True)
class LastCall:
    """The last call of a branch: one that differs in the values of its tensors alone need not be looked at anew.

    Args:
        key: kind of the call.
        tensors: shape and type of the tensors, by name.
        others: the other arguments.
        numbers: what stands for those of them that are free sizes.
    """

    key: Hashable
    tensors: Mapping[str, tuple[torch.Size, torch.dtype]]
    others: Mapping[str, Any]
    numbers: Mapping[str, Tensor]

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
        variants: programs and engines, one for each kind of calls.
        signature: how the model is called.
    """

    def __init__(self, variants: Sequence[Variant], signature: Signature) -> None:
        self._signature = signature
        self._device = variants[0].device
        self._variants: dict[Hashable, list[Variant]] = {}
        for each in variants:
            kind = call_kind(_tensor_inputs(each), dict(each.constants))
            self._variants.setdefault(kind, []).append(each)
        self._free = [each for each in variants if each.has_free_sizes]
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
            given = {name: arguments[name] for name in last.tensors}
            given.update(last.numbers)
            return given, last.key
        leaves = named_leaves(arguments)
        tensors = {name: leaf for name, leaf in leaves.items() if isinstance(leaf, Tensor)}
        constants = self._signature.constants(arguments, leaves)
        for name, tensor in tensors.items():
            if tensor.device != self._device:
                raise MismatchError(f"input {name!r} is on {tensor.device}, the engines are on {self._device}; move it")
        key = call_kind(tensors, constants)
        if key not in self._variants and not self._is_among_free_sizes(tensors, constants, key):
            raise MismatchError(self._no_variant(tensors, constants))
        self._last.pop(branch, None)
        numbers = {name: number_as_shape(leaves[name], self._device) for name in self._variants[key][0].numbers}
        if is_flat(arguments):
            others = {name: value for name, value in arguments.items() if name not in tensors}
            facts = {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
            self._last[branch] = LastCall(key, facts, others, numbers)
        return tensors | numbers, key

    def _is_among_free_sizes(self, tensors: Mapping[str, Tensor], constants: Mapping[str, str], key: Hashable) -> bool:
        """Whether a call of sizes that were not met yet is served all the same, which is then remembered."""
        serving = [each for each, reason in self._alike(tensors, constants) if reason is None]
        if serving:
            self._variants[key] = serving
        return bool(serving)

    def _alike(self, tensors: Mapping[str, Tensor], constants: Mapping[str, str]) -> list[tuple[Variant, str | None]]:
        """Those with free sizes that a call differs from in sizes alone, and why they do not serve it."""
        shapes: dict[str, Sequence[int]] = {name: tensor.shape for name, tensor in tensors.items()}
        types = {name: tensor.dtype for name, tensor in tensors.items()}
        found = []
        for each in self._free:
            numbers = {
                name: (int(text),) for name, text in constants.items() if name in each.numbers and _is_size(text)
            }
            others = {name: text for name, text in constants.items() if name not in numbers}
            expected = {value.name: value.dtype for value in each.inputs if value.name not in numbers}
            if others == dict(each.constants) and expected == types:
                found.append((each, each.unmet({**shapes, **numbers})))
        return found

    def _no_variant(self, tensors: Mapping[str, Tensor], constants: Mapping[str, str]) -> str:
        compiled = [each for (each, *_) in self._variants.values()]
        several = [_differences(each, tensors, constants) for each in compiled]
        nearest = min(several, key=len)
        reasons = [reason for _, reason in self._alike(tensors, constants) if reason]
        if not nearest:  # each input is as compiled, but not together
            nearest = [text for each in compiled for text in _free_inputs(each, tensors)]
        wrong = [*nearest, *reasons[:1]]
        return f"no engine for these inputs: {'; '.join(wrong)}; compile for them too"


def _differences(variant: Variant, tensors: Mapping[str, Tensor], constants: Mapping[str, str]) -> list[str]:
    """In what a call is not as compiled, for people."""
    expected: dict[str, Tensor | Value | str] = {**dict(variant.constants), **_tensor_inputs(variant)}
    given: dict[str, Tensor | str] = {**constants, **tensors}
    ranges = variant.programs["recompute"].ranges
    return [
        f"{name} is {_describe(given.get(name, 'missing'), {})}, compiled"
        f" {_describe(expected.get(name, 'without'), ranges)}"
        for name in {**given, **expected}
        if name not in given or name not in expected or not _fits(given[name], expected[name])
    ]


def _fits(given: Tensor | str, expected: Tensor | Value | str) -> bool:
    """Whether an argument is as compiled, but for free sizes."""
    if isinstance(given, str):
        is_number = isinstance(expected, Value) and expected.kind is Kind.SHAPE
        return _is_size(given) if is_number else given == expected
    if isinstance(expected, str) or (given.dtype, given.dim()) != (expected.dtype, len(expected.shape)):
        return False
    terms = expected.terms if isinstance(expected, Value) else ("",) * given.dim()
    return all(term or one == other for term, one, other in zip(terms, given.shape, expected.shape, strict=True))


def _free_inputs(variant: Variant, tensors: Mapping[str, Tensor]) -> list[str]:
    """The inputs with free sizes, as they are and as compiled."""
    ranges = variant.programs["recompute"].ranges
    return [
        f"{value.name} is {_describe(tensors[value.name], {})}, compiled {_describe(value, ranges)}"
        for value in variant.inputs
        if value.free and value.name in tensors
    ]


def _is_size(text: str) -> bool:
    """Whether a constant is a number that may be a size."""
    return text.isdigit() and is_number(int(text))


def _tensor_inputs(variant: Variant) -> dict[str, Tensor | Value]:
    """What has the shape and type of each tensor input."""
    return {**variant.fixed, **{value.name: value for value in variant.inputs}}


def _describe(value: Tensor | Value | str, ranges: Mapping[str, tuple[int, int]]) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, Value) and value.kind is Kind.SHAPE:
        return value.shape_text(ranges).strip("[]")
    shape = value.shape_text(ranges) if isinstance(value, Value) else str(list(value.shape))
    return f"{str(value.dtype).removeprefix('torch.')}{shape}"
