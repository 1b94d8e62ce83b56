"""Build the program that fills the tables which hoisted step programs read."""

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from recache_compile.errors import PassError
from recache_compile.export import export_module, flatten
from recache_compile.passes.binding_times import binding_times
from recache_compile.passes.hoist import Entry, padded
from recache_compile.passes.map_rows import use_free_row_rules
from recache_compile.program import MIN_ROWS, Binding, Kind, Program, Value


def build_prologue(annotated: Program, steps: Mapping[str, Program]) -> Program:
    """One program for all latents-independent work of a generation.

    Its inputs are, per table, the timesteps of the steps that read it (rows, *shape), and
    the conditioning.  Its results are, per table, `fixed_*` (size,) and `row_*` (rows, size):
    the timestep-dependent part is mapped over all rows at once (`torch.vmap`).

    Args:
        annotated: the captured program with its cache points.
        steps: one hoisted step program for each table, by the table's name.

    Raises:
        PassError: a step program reads a value that the captured program does not have.
    """
    graph = annotated.module.graph
    nodes = {node.name: node for node in graph.nodes}
    tables = {
        table: {
            (node.meta["value"].kind, node.meta["value"].name): _resolve(node.meta["layout"], nodes, step.name)
            for node in step.module.graph.find_nodes(op="placeholder")
            if "layout" in node.meta
        }
        for table, step in steps.items()
    }
    prologue = _Prologue(annotated.module, tables)
    arguments, shapes, values = [], [], []
    for table in prologue.row_tables:
        for node in prologue.given_timesteps:
            fake = node.meta["val"]
            arguments.append(torch.zeros(MIN_ROWS + 1, *fake.shape, dtype=fake.dtype, device=fake.device))
            shapes.append({0: torch.export.Dim(f"{table}_rows", min=MIN_ROWS)})
            value = node.meta["value"]
            values.append(Value(f"{value.name}@{table}", Kind.TIMESTEP, (None, *value.shape), value.dtype))
    for node in prologue.given_conditioning:
        fake = node.meta["val"]
        arguments.append(torch.zeros(fake.shape, dtype=fake.dtype, device=fake.device))
        shapes.append({})
        values.append(node.meta["value"])
    exported = export_module(prologue, tuple(arguments), {}, dynamic_shapes=(tuple(shapes),)).run_decompositions({})
    module = flatten(exported, {id(weight): name for name, weight in annotated.weights.items()}, "constant_prologue")
    for node, value in zip(module.graph.find_nodes(op="placeholder"), values, strict=True):
        node.meta["value"] = value
    module.graph.output_node().meta["values"] = prologue.values
    for node in module.graph.find_nodes(op="placeholder"):
        if not node.users:
            module.graph.erase_node(node)
    module.recompile()
    return Program("prologue", module, (*annotated.provenance, "build-prologue"))


class _Prologue(nn.Module):
    """The latents-independent part of a captured graph, cut out and mapped over table rows."""

    def __init__(self, module: fx.GraphModule, tables: Mapping[str, Mapping[tuple[Kind, str], Any]]) -> None:
        super().__init__()
        times = binding_times(module.graph)
        inputs = module.graph.find_nodes(op="placeholder")
        self.given_timesteps = [node for node in inputs if node.meta["value"].kind is Kind.TIMESTEP]
        self.given_conditioning = [node for node in inputs if node.meta["value"].kind is Kind.CONDITIONING]
        self.tables = tables
        self.shared: list[fx.Node] = []
        rows: dict[str, list[fx.Node]] = {}
        for table, packs in tables.items():
            members = [node for (kind, _), pack in packs.items() if kind is Kind.TABLE_ROW for node, _ in pack]
            rows[table] = members
            fixed = [node for (kind, _), pack in packs.items() if kind is Kind.FIXED for node, _ in pack]
            frontier = [node for node in _ancestors(members) if _is_shared(node, times)]
            self.shared.extend(node for node in (*fixed, *frontier) if node not in self.shared)
        self.row_tables = [table for table, members in rows.items() if members]
        self.fixed_part = _extract(module, self.given_conditioning, self.shared)
        parts = {
            table: _extract(module, [*self.given_timesteps, *self.shared], rows[table]) for table in self.row_tables
        }
        for part in parts.values():
            use_free_row_rules(part.graph)
            part.recompile()
        self.row_parts = nn.ModuleDict(parts)
        self.row_nodes = rows

    @property
    def values(self) -> tuple[Value, ...]:
        """Facts about the results, in order."""
        facts = []
        for table, packs in self.tables.items():
            for (kind, name), pack in packs.items():
                size = sum(padded(prod(entry.shape)) for _, entry in pack)
                shape = (None, size) if kind is Kind.TABLE_ROW else (size,)
                facts.append(Value(f"{table}.{name}", Kind.TABLE, shape, pack[0][0].meta["val"].dtype))
        return tuple(facts)

    def forward(self, *arguments: Tensor) -> list[Tensor]:
        """Timesteps per row table, then the conditioning."""
        count = len(self.given_timesteps)
        first = count * len(self.row_tables)
        shared = self.fixed_part(*arguments[first:])
        computed = dict(zip(self.shared, shared, strict=True))
        results = []
        for table, packs in self.tables.items():
            rows: dict[fx.Node, Tensor] = {}
            if table in self.row_parts:
                at = self.row_tables.index(table) * count
                mapped = torch.vmap(self.row_parts[table], in_dims=(0,) * count + (None,) * len(shared))
                rows = dict(zip(self.row_nodes[table], mapped(*arguments[at : at + count], *shared), strict=True))
            for (kind, _), pack in packs.items():
                if kind is Kind.TABLE_ROW:
                    results.append(torch.cat([_pad(rows[node].flatten(1)) for node, _ in pack], 1))
                else:
                    results.append(torch.cat([_pad(computed[node].flatten()) for node, _ in pack]))
        return results


def _pad(value: Tensor) -> Tensor:
    size = value.shape[-1]
    return functional.pad(value, (0, padded(size) - size)) if padded(size) > size else value


def _resolve(entries: Sequence[Entry], nodes: Mapping[str, fx.Node], step: str) -> tuple[tuple[fx.Node, Entry], ...]:
    missing = [entry.node for entry in entries if entry.node not in nodes]
    if missing:
        raise PassError(f"build-prologue: {step} reads {missing}, which the captured program does not compute")
    return tuple((nodes[entry.node], entry) for entry in entries)


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
    if node.op == "get_attr" or Binding.TIMESTEP in times[node] or not isinstance(node.meta.get("val"), Tensor):
        return False
    return any(Binding.TIMESTEP in times[user] for user in node.users)


def _extract(module: fx.GraphModule, given: Sequence[fx.Node], wanted: Sequence[fx.Node]) -> fx.GraphModule:
    """The part of a graph that computes `wanted` from `given` and weights."""
    graph = fx.Graph()
    copies = {}
    for number, node in enumerate(given):
        copies[node] = graph.placeholder(f"given_{number}")
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
