"""Example calls: what engines are captured from."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from recache_compile.errors import CaptureError, ModelError
from recache_compile.ir.program import Program
from recache_compile.ir.signature import call_kind, is_number, named_leaves
from recache_compile.ir.value import Kind


@dataclass(frozen=True, slots=True)
class Example:
    """One call of a model, at the shapes to compile for.

    Args:
        inputs: arguments of the call.
        timesteps: per timestep input, its value at every step (num_steps, *shape); empty
            when unknown, and then learned at run time.
        roles: of inputs whose behaviour, not their name, tells it.
        others: calls of the same shapes with other values, for models that decide by values.
        attention: which attention processors of its own the pipeline sets for these calls; "": none.
        processors: all that are set then, by name; see `capture.processors`.
        levels: noise level of every step, where known.
    """

    inputs: Mapping[str, Any]
    timesteps: Mapping[str, Tensor] = field(default_factory=dict)
    roles: Mapping[str, Kind] = field(default_factory=dict)
    others: tuple[Mapping[str, Any], ...] = ()
    attention: str = ""
    processors: Mapping[str, Any] = field(default_factory=dict)
    levels: tuple[float, ...] = ()

    @property
    def device(self) -> torch.device:
        """Where the inputs are."""
        return next(leaf.device for leaf in named_leaves(self.inputs).values() if isinstance(leaf, Tensor))

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of every tensor, and (number,) for what may be a size, see `number_as_shape`; by dotted name."""
        return {
            name: tuple(leaf.shape) if isinstance(leaf, Tensor) else (leaf,)
            for name, leaf in named_leaves(self.inputs).items()
            if isinstance(leaf, Tensor) or is_number(leaf)
        }


def given_examples(
    who: str, inputs: Mapping[str, Any] | Iterable[Mapping[str, Any]], timesteps: Mapping[str, Tensor]
) -> list[Example]:
    """The examples that a user states.

    Args:
        who: the model's name, for messages.
        inputs: arguments of one call, or of several.
        timesteps: of the first call.

    Raises:
        ModelError: there are none.
    """
    each = [inputs] if isinstance(inputs, Mapping) else list(inputs)
    if not each:
        raise ModelError(f"{who}: example_inputs is empty; give the arguments of at least one call")
    return [Example(one, timesteps if number == 0 else {}) for number, one in enumerate(each)]


def distinct(examples: Iterable[Example]) -> list[Example]:
    """One example for each kind of call: those of the same shapes and constants are others of the first."""
    kinds: dict[Any, Example] = {}
    for example in examples:
        kind = call_kind(named_leaves(example.inputs)), example.attention
        first = kinds.setdefault(kind, example)
        if first is not example:
            kinds[kind] = replace(first, others=(*first.others, example.inputs, *example.others))
    return list(kinds.values())


def alike(examples: Iterable[Example]) -> list[list[Example]]:
    """Those that may share engines: they differ in sizes alone, none of which is 1 in one of them, or in numbers."""
    groups: dict[Any, list[Example]] = {}
    for example in examples:
        leaves = named_leaves(example.inputs)
        tensors = {name: leaf for name, leaf in leaves.items() if isinstance(leaf, Tensor)}
        ones = [(name, leaf.dtype, tuple(size == 1 for size in leaf.shape)) for name, leaf in tensors.items()]
        constants = [
            (name, "a number" if is_number(leaf) else repr(leaf))
            for name, leaf in leaves.items()
            if name not in tensors
        ]
        groups.setdefault((tuple(ones), tuple(constants), example.attention), []).append(example)
    return list(groups.values())


def differing_sizes(examples: Iterable[Example]) -> dict[str, tuple[int, ...]]:
    """Dimensions in which inputs of examples that are alike differ, by name."""
    shapes: dict[str, list[tuple[int, ...]]] = {}
    for example in examples:
        for name, shape in example.shapes.items():
            shapes.setdefault(name, []).append(shape)
    found = {
        name: tuple(at for at, sizes in enumerate(zip(*each, strict=True)) if len(set(sizes)) > 1)
        for name, each in shapes.items()
    }
    return {name: dimensions for name, dimensions in found.items() if dimensions}


def check_timesteps(example: Example, captured: Program, num_steps: int) -> dict[str, Tensor]:
    """The timetable in the inputs' dtype and place.

    Raises:
        CaptureError: a name or a shape does not fit the captured program.
    """
    inputs = {value.name: value for value in captured.inputs if value.kind is Kind.TIMESTEP}
    checked = {}
    for name, column in example.timesteps.items():
        if name not in inputs:
            raise CaptureError(f"timesteps: {name!r} is no timestep input; these are: {', '.join(inputs) or 'none'}")
        expected = (num_steps, *inputs[name].shape)
        if tuple(column.shape) != expected:
            raise CaptureError(
                f"timesteps {name!r}: shape {tuple(column.shape)}, expected (num_steps, *shape) = {expected}"
            )
        checked[name] = column.to(example.device, inputs[name].dtype)
    return checked
