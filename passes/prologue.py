"""Build the program that fills the tables which hoisted step programs read."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from recache_compile.capture.export import export_module, flatten
from recache_compile.errors import PassError, check_memory, first_line
from recache_compile.ir.meta import (
    by_origin,
    describe_input,
    describe_outputs,
    layout_of,
    result_of,
    tensor_of,
    value_of,
)
from recache_compile.ir.program import Binding, PassRecord, Program
from recache_compile.ir.value import Kind, Value
from recache_compile.passes.binding_times import binding_times
from recache_compile.passes.hoist import has_free_size, padded
from recache_compile.passes.map_rows import check_free, free_dimensions, use_free_row_rules, zeros
from recache_compile.passes.ops import is_size

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PackedInput:
    """One packed input of a step program, as nodes of the captured graph; one with a free size stands for itself."""

    table: str
    name: str
    kind: Kind
    members: tuple[fx.Node, ...]

    @property
    def is_single(self) -> bool:
        """Whether it is one value in its own shape."""
        return has_free_size(self.members[0])

    def value(self, rows: int | None) -> Value:
        """The prologue's result that fills it."""
        kind = Kind.TABLE if self.kind is Kind.TABLE_ROW else Kind.FIXED
        facts: dict[str, Any] = {"table": self.table, "source": self.name}
        if self.is_single:
            single = Value.like(tensor_of(self.members[0]), f"{self.table}.{self.name}", kind, **facts)
            return single if kind is Kind.FIXED else replace(single.with_rows, shape=(rows, *single.shape))
        size = sum(padded(prod(tensor_of(node).shape)) for node in self.members)
        shape = (rows, size) if kind is Kind.TABLE else (size,)
        return Value(f"{self.table}.{self.name}", kind, shape, tensor_of(self.members[0]).dtype, **facts)


def build_prologue(annotated: Program, steps: Mapping[str, Program]) -> Program:
    """One program for all latents-independent work of a generation.

    Its inputs are, per table, the timesteps of the steps that read it (rows, *shape), and
    the conditioning.  Its results are, per table, `fixed_*` (size,) and `row_*` (rows, size):
    the timestep-dependent part is mapped over all rows at once (`torch.vmap`).  Where one of
    its operators cannot be mapped over a free number of rows, a call makes one row.

    Args:
        annotated: the captured program with its cache points.
        steps: one hoisted step program for each table, by the table's name.

    Raises:
        PassError: a step program reads a value that the captured program does not have.
    """
    packs = [pack for table, step in steps.items() for pack in _packed_inputs(annotated, table, step)]
    has_rows = any(pack.kind is Kind.TABLE_ROW for pack in packs)
    try:
        return _build(annotated, packs, None)
    except Exception as error:  # torch raises many kinds, depending on the operator
        check_memory(error)
        if not has_rows:
            raise _refusal(error) from error
        log.debug("rows are made one by one, they cannot be mapped over a free number: %s", first_line(error))
    try:
        return _build(annotated, packs, 1)
    except Exception as error:
        check_memory(error)
        raise _refusal(error) from error


def _refusal(error: Exception) -> PassError:
    return PassError(
        "build-prologue: the work that does not depend on the latents cannot be exported"
        f" ({first_line(error)}); compile without hoisting: hoist=False, --no-hoist"
    )


def _build(annotated: Program, packs: Sequence[PackedInput], rows: int | None) -> Program:
    """The prologue for a number of rows; None: free."""
    prologue = _Prologue(annotated.module, packs, rows)
    values = [value for table in prologue.row_parts for value in _row_values(prologue.timesteps, table, rows)]
    values += [value_of(node) for node in prologue.conditioning]
    values += [replace(value_of(node), kind=Kind.SHAPE) for node in prologue.sized]
    shapes = tuple(map(free_dimensions, values))
    exported = export_module(
        prologue, prologue.example(values), {}, dynamic_shapes=(shapes,) if values else None, decompose=True
    )
    names = {id(weight): name for name, weight in annotated.weights.items()}
    module = flatten(exported, names, "constant_prologue")
    for node, value in zip(module.graph.find_nodes(op="placeholder"), values, strict=True):
        check_free(node, value)
        describe_input(node, value)
        if not node.users:
            module.graph.erase_node(node)
    describe_outputs(module.graph.output_node(), (pack.value(rows) for pack in packs))
    module.recompile()
    return Program("prologue", module, (*annotated.provenance, PassRecord("build-prologue")), annotated.ranges)


class _Prologue(nn.Module):
    """The latents-independent part of a captured graph, cut out and mapped over table rows, if there are several."""

    def __init__(self, module: fx.GraphModule, packs: Sequence[PackedInput], num_rows: int | None) -> None:
        super().__init__()
        self.num_rows = num_rows
        inputs = module.graph.find_nodes(op="placeholder")
        self.timesteps = [node for node in inputs if value_of(node).kind is Kind.TIMESTEP]
        self.conditioning = [node for node in inputs if value_of(node).kind is Kind.CONDITIONING]
        self.sized = [
            node
            for node in inputs
            if value_of(node).kind in (Kind.LATENTS, Kind.SHAPE) and any(map(is_size, node.users))
        ]
        self.packs = packs
        self.rows: dict[str, list[fx.Node]] = {}
        for pack in packs:
            if pack.kind is Kind.TABLE_ROW:
                self.rows.setdefault(pack.table, []).extend(pack.members)
        fixed = [node for pack in packs if pack.kind is Kind.FIXED for node in pack.members]
        times = binding_times(module.graph)
        read = [node for members in self.rows.values() for node in _ancestors(members) if _is_shared(node, times)]
        self.shared = list(dict.fromkeys((*fixed, *read)))
        self.fixed_part = _extract(module, [*self.conditioning, *self.sized], self.shared)
        self.row_parts = nn.ModuleDict()
        for table, members in self.rows.items():
            part = _extract(module, [*self.timesteps, *self.shared], members)
            if num_rows is None:
                use_free_row_rules(part.graph)
                part.recompile()
            self.row_parts[table] = part

    def example(self, values: Sequence[Value]) -> tuple[Tensor, ...]:
        """Zeros for the inputs."""
        return zeros(values, [*self.timesteps * len(self.row_parts), *self.conditioning, *self.sized])

    def forward(self, *arguments: Tensor) -> list[Tensor]:
        """Timesteps for each row table, then the conditioning, then what sizes are read of."""
        count = len(self.timesteps)
        first = count * len(self.row_parts)
        shared = self.fixed_part(*arguments[first:])
        fixed = dict(zip(self.shared, shared, strict=True))
        rows: dict[str, dict[fx.Node, Tensor]] = {}
        for at, (table, part) in enumerate(self.row_parts.items()):
            timesteps = arguments[at * count : (at + 1) * count]
            if self.num_rows is None:
                results = torch.vmap(part, in_dims=(0,) * count + (None,) * len(shared))(*timesteps, *shared)
            else:
                results = [result[None] for result in part(*(timestep[0] for timestep in timesteps), *shared)]
            rows[table] = dict(zip(self.rows[table], results, strict=True))
        return [_filled(pack, rows[pack.table] if pack.kind is Kind.TABLE_ROW else fixed) for pack in self.packs]


def _filled(pack: PackedInput, values: Mapping[fx.Node, Tensor]) -> Tensor:
    """The result for one packed input."""
    members = [values[node] for node in pack.members]
    if pack.is_single:
        return members[0].clone(memory_format=torch.contiguous_format)
    if pack.kind is Kind.TABLE_ROW:
        return torch.cat([_pad(_flat_rows(member)) for member in members], 1)
    return torch.cat([_pad(member.flatten()) for member in members])


def _packed_inputs(annotated: Program, table: str, step: Program) -> list[PackedInput]:
    """What a step program reads, as nodes of the captured graph."""
    nodes = by_origin(annotated.module.graph)
    packs = []
    for packed in step.module.graph.find_nodes(op="placeholder"):
        entries = layout_of(packed)
        missing = [entry for entry in entries if entry.node not in nodes]
        if missing:
            raise PassError(
                f"build-prologue: {step.name} reads {len(missing)} values of {value_of(packed).name} that"
                f" {annotated.name} does not compute; specialise and hoist that program"
            )
        if entries:
            value = value_of(packed)
            packs.append(PackedInput(table, value.name, value.kind, tuple(nodes[entry.node] for entry in entries)))
    return packs


def _row_values(timesteps: Sequence[fx.Node], table: str, rows: int | None) -> list[Value]:
    """The timesteps of one table's rows."""
    facts = [value_of(node) for node in timesteps]
    return [
        replace(fact.with_rows, name=f"{fact.name}@{table}", shape=(rows, *fact.shape), table=table, source=fact.name)
        for fact in facts
    ]


def _flat_rows(value: Tensor) -> Tensor:
    return value.flatten(1) if value.dim() > 1 else value[:, None]


def _pad(value: Tensor) -> Tensor:
    size = value.shape[-1]
    return functional.pad(value, (0, padded(size) - size)) if padded(size) > size else value


def _ancestors(nodes: Sequence[fx.Node]) -> list[fx.Node]:
    """Everything that the nodes are computed from, themselves included."""
    seen: dict[fx.Node, None] = {}
    pending = list(nodes)
    while pending:
        node = pending.pop()
        if node not in seen:
            seen[node] = None
            pending.extend(node.all_input_nodes)
    return list(seen)


def _is_shared(node: fx.Node, times: Mapping[fx.Node, Binding]) -> bool:
    """Whether a timestep-dependent value reads this node, which itself is the same for all rows."""
    is_value = isinstance(result_of(node), Tensor) or is_size(node)
    if node.op == "get_attr" or Binding.TIMESTEP in times[node] or not is_value:
        return False
    return any(Binding.TIMESTEP in times[user] for user in node.users)


def _extract(module: fx.GraphModule, given: Sequence[fx.Node], wanted: Sequence[fx.Node]) -> fx.GraphModule:
    """The part of a graph that computes `wanted` from `given` and weights."""
    graph = fx.Graph()
    copies = {node: graph.placeholder(f"given_{number}") for number, node in enumerate(given)}
    needed: set[fx.Node] = set()
    pending = [node for node in wanted if node not in copies]
    while pending:
        node = pending.pop()
        if node not in needed:
            needed.add(node)
            pending.extend(source for source in node.all_input_nodes if source not in copies)
    for node in module.graph.nodes:
        if node in needed:
            copies[node] = graph.node_copy(node, lambda source: copies[source])
    graph.output(tuple(copies[node] for node in wanted))
    return fx.GraphModule(module, graph)
