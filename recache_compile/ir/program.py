"""Programs: FX graphs whose inputs and outputs are described by facts, not by convention."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import Flag, StrEnum, auto
from typing import Any

import torch
from torch import Tensor, fx, nn

from recache_compile.ir.meta import value_of, values_of
from recache_compile.ir.value import Kind, Value

SitePattern = tuple[int, ...]
"""One entry per cache site: 0 = recompute, h >= 1 = forecast from h anchors."""

MIN_ROWS = 2
"""A table has at least two rows: `torch.export` would specialise a free size of 0 or 1."""


REQUESTS = "recompute_requests"
"""Name of the recompute program that serves any number of requests in one call."""


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
class PassRecord:
    """One thing that was done to a program.

    Args:
        name: of the pass.
        options: of the pass, as text for people.
    """

    name: str
    options: str = ""

    def __str__(self) -> str:
        """As "specialise(pattern=(1,))"."""
        return f"{self.name}({self.options})" if self.options else self.name


@dataclass(frozen=True, slots=True)
class Program:
    """One FX graph ready to lower.

    Every placeholder carries its `Value`, and the output node those of the results (`ir/meta.py`).
    All arguments and results are flat tensors.

    Args:
        name: "capture", "prologue", "recompute", "forecast" ...
        module: the graph and the weights it reads, under the model's own names.
        provenance: the passes that made it, in order.
        ranges: smallest and largest of each free size among the examples, by symbol.
    """

    name: str
    module: fx.GraphModule
    provenance: tuple[PassRecord, ...] = ()
    ranges: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def inputs(self) -> tuple[Value, ...]:
        """Facts about the placeholders, in call order."""
        return tuple(value_of(node) for node in self.module.graph.find_nodes(op="placeholder"))

    @property
    def outputs(self) -> tuple[Value, ...]:
        """Facts about the results, in order."""
        return values_of(self.module.graph.output_node())

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
    def num_anchors(self) -> int:
        """How many anchors the program forecasts from; 0: it forecasts nothing."""
        return max((value.shape[-1] or 0 for value in self.inputs if value.kind is Kind.COEFFICIENTS), default=0)

    @property
    def serves_gaps(self) -> bool:
        """Whether a call of this forecast program makes the predictions of any number of steps."""
        return any(value.kind is Kind.COEFFICIENTS and value.shape[0] is None for value in self.inputs)

    @property
    def makes_one_row(self) -> bool:
        """Whether a call of this prologue makes one row of its tables, and not any number of rows."""
        return any(value.kind is Kind.TABLE and value.shape[0] is not None for value in self.outputs)

    def renamed(self, name: str) -> "Program":
        """The same program under another name."""
        return replace(self, name=name)


def pattern_name(pattern: SitePattern) -> str:
    """ "recompute" and "forecast" for uniform patterns; mixed ones are spelled out.

    It does not depend on the number of anchors: those that are missing have weight zero.  The
    prologue's table that the program reads has the same name.
    """
    kinds = {bool(entry) for entry in pattern}
    if len(kinds) > 1:
        return "pattern_" + "_".join(map(str, pattern))
    return "forecast" if kinds.pop() else "recompute"


def dtype_name(dtype: torch.dtype) -> str:
    """ "float32" for `torch.float32`."""
    return str(dtype).removeprefix("torch.")


def get_attribute(module: nn.Module, name: str) -> Any:
    """Follow a dotted name."""
    value: Any = module
    for part in name.split("."):
        value = getattr(value, part)
    return value
