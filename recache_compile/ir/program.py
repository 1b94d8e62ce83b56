"""Programs: FX graphs whose inputs and outputs are described by facts, not by convention."""

from dataclasses import dataclass, replace
from enum import Flag, StrEnum, auto
from typing import Any

import torch
from torch import Tensor, fx, nn

SitePattern = tuple[int, ...]
"""One entry per cache site: 0 = recompute, h >= 1 = forecast from h anchors."""

MIN_ROWS = 2
"""A table has at least two rows: `torch.export` would specialise a free size of 0 or 1."""


class Role(StrEnum):
    """How often an input of the model changes."""

    LATENTS = "latents"
    TIMESTEP = "timestep"
    CONDITIONING = "conditioning"


class Kind(StrEnum):
    """What a program's input or output is.

    A prologue's outputs are of kind TABLE (rows, size) or FIXED (size,); the step programs
    read a TABLE_ROW (size,) of the one, and the other as it is.
    """

    LATENTS = "latents"
    TIMESTEP = "timestep"
    CONDITIONING = "conditioning"
    HISTORY = "history"
    COEFFICIENTS = "coefficients"
    TABLE_ROW = "row"
    FIXED = "fixed"
    PREDICTION = "prediction"
    FEATURE = "feature"
    TABLE = "table"


class Binding(Flag):
    """What a node's value depends on (binding-time analysis)."""

    NOTHING = 0
    TIMESTEP = auto()
    CONDITIONING = auto()
    LATENTS = auto()


class Granularity(StrEnum):
    """Where cache sites are placed."""

    OUTPUT = "output"
    STACK = "stack"
    BLOCK = "block"
    MODULE = "module"


@dataclass(frozen=True, slots=True)
class Value:
    """An input or output of a program.

    Args:
        name: unique within the program.
        kind: what it is.
        shape: sizes; None marks a size that is free at run time.
        dtype: element type.
        site: cache site that a HISTORY input or FEATURE output belongs to.
        slot: history slot of a HISTORY input.
        table: of a prologue's input or output, the table that its rows belong to.
        source: of a prologue's input, the model's input that it stands for; of a prologue's
            output, the packed input of the step programs that it fills.
    """

    name: str
    kind: Kind
    shape: tuple[int | None, ...]
    dtype: torch.dtype
    site: int | None = None
    slot: int | None = None
    table: str | None = None
    source: str | None = None

    @property
    def nbytes(self) -> int:
        """Size in bytes; a free dimension counts once."""
        size = self.dtype.itemsize
        for length in self.shape:
            size *= 1 if length is None else length
        return size


@dataclass(frozen=True, slots=True)
class Program:
    """One FX graph ready to lower.

    Every placeholder carries its `Value` in `meta["value"]`; the output node carries the
    tuple of its values in `meta["values"]`.  All arguments and results are flat tensors.

    Args:
        name: "capture", "prologue", "recompute", "forecast_2" ...
        module: the graph and the weights it reads, under the model's own names.
        provenance: names of the passes that made it, in order.
    """

    name: str
    module: fx.GraphModule
    provenance: tuple[str, ...] = ()

    @property
    def inputs(self) -> tuple[Value, ...]:
        """Facts about the placeholders, in call order."""
        return tuple(node.meta["value"] for node in self.module.graph.find_nodes(op="placeholder"))

    @property
    def outputs(self) -> tuple[Value, ...]:
        """Facts about the results, in order."""
        return tuple(self.module.graph.output_node().meta["values"])

    @property
    def weights(self) -> dict[str, Tensor]:
        """The parameters and buffers that the graph reads, by their name in the model."""
        names = dict.fromkeys(str(node.target) for node in self.module.graph.find_nodes(op="get_attr"))
        return {name: get_attribute(self.module, name) for name in names}

    @property
    def num_parameters(self) -> int:
        """Number of weight elements that the program reads."""
        return sum(weight.numel() for weight in self.weights.values())

    @property
    def num_calls(self) -> int:
        """Number of operator calls in the graph."""
        return sum(node.op == "call_function" for node in self.module.graph.nodes)

    @property
    def makes_one_row(self) -> bool:
        """Whether a call of this prologue makes one row of its tables, and not any number of rows."""
        return any(value.kind is Kind.TABLE and value.shape[0] is not None for value in self.outputs)

    def renamed(self, name: str) -> "Program":
        """The same program under another name."""
        return replace(self, name=name)


def pattern_name(pattern: SitePattern) -> str:
    """ "recompute" and "forecast_h" for uniform patterns; mixed ones are spelled out."""
    kinds = set(pattern)
    if len(kinds) > 1:
        return "pattern_" + "_".join(map(str, pattern))
    (kind,) = kinds
    return f"forecast_{kind}" if kind else "recompute"


def table_name(pattern: SitePattern) -> str:
    """Name of the prologue table that a pattern's program reads: it depends on which sites are recomputed."""
    return "forecast" if len(set(pattern)) == 1 and any(pattern) else pattern_name(pattern)


def dtype_name(dtype: torch.dtype) -> str:
    """ "float32" for `torch.float32`."""
    return str(dtype).removeprefix("torch.")


def get_attribute(module: nn.Module, name: str) -> Any:
    """Follow a dotted name."""
    value: Any = module
    for part in name.split("."):
        value = getattr(value, part)
    return value
