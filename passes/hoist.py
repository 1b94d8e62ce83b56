"""Move all latents-independent work out of the step programs, into one prologue."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import ClassVar

from torch import fx
from typing_extensions import override

from recache_compile.errors import PassError
from recache_compile.ir.meta import (
    Entry,
    is_kept_in_step,
    keep_in_step,
    layout_of,
    origin_of,
    set_layout,
    tensor_of,
    value_of,
)
from recache_compile.ir.program import Binding
from recache_compile.ir.value import Kind, Value
from recache_compile.passes.base import Pass, call
from recache_compile.passes.binding_times import binding_times
from recache_compile.passes.ops import aten, is_cheap, memory_of
from recache_compile.passes.specialise import add_input, remove_dead_inputs

ALIGNMENT = 64
"""Elements; every value starts at a multiple of it, so that vectorised loads stay aligned."""


@dataclass(frozen=True, slots=True)
class Hoist(Pass):
    """Let a step program read its latents-independent values from packed inputs.

    The values that cross are packed into one flat input per dtype and frequency: `row_*`
    (depends on the timestep: one row per step) and `fixed_*` (once per generation).  Views
    and arithmetic on one tensor stay where they are used, which keeps the number of
    crossing values small.  The layout is kept on the new inputs, for
    `build_prologue`.

    A row has a price: it is held once for every step.  Where all rows together would take
    more than `row_bytes` per step, the largest values stay in the step, and
    are marked as kept there: the modulation of models whose timestep differs from token to token,
    for example, is as large as their activations.

    Args:
        row_bytes: limit for one row; None: no limit.
    """

    row_bytes: int | None = None
    name: ClassVar[str] = "hoist"
    requires: ClassVar[tuple[str, ...]] = ("specialise",)

    @override
    def rewrite(self, module: fx.GraphModule) -> bool:
        graph = module.graph
        times = binding_times(graph)
        crossing = affordable_boundary(graph, self.row_bytes)
        for kind, prefix in ((Kind.TABLE_ROW, "row"), (Kind.FIXED, "fixed")):
            timely = [node for node in crossing if (Binding.TIMESTEP in times[node]) == (kind is Kind.TABLE_ROW)]
            for dtype in dict.fromkeys(tensor_of(node).dtype for node in timely):
                members = [node for node in timely if tensor_of(node).dtype == dtype]
                read_packed(graph, members, kind, f"{prefix}_{str(dtype).removeprefix('torch.')}")
        own_results(graph)
        before = len(graph.nodes)
        remove_dead_inputs(graph)
        return bool(crossing) or len(graph.nodes) != before


def affordable_boundary(graph: fx.Graph, row_bytes: int | None) -> list[fx.Node]:
    """The boundary, once the largest timestep-dependent values stay in the step where a row would be too large."""
    times = binding_times(graph)
    while True:
        crossing = boundary(graph, times)
        rows = [node for node in crossing if Binding.TIMESTEP in times[node]]
        movable = [node for node in rows if node.op != "placeholder"]
        if row_bytes is None or not movable or sum(tensor_of(node).nbytes for node in rows) <= row_bytes:
            return crossing
        keep_in_step(max(movable, key=lambda node: tensor_of(node).nbytes))


def boundary(graph: fx.Graph, times: Mapping[fx.Node, Binding]) -> list[fx.Node]:
    """The latents-independent values that a step must be given, in graph order."""
    crossing: set[fx.Node] = set()
    visited: set[fx.Node] = set()
    readers = [node for node in graph.nodes if node.op == "output" or Binding.LATENTS in times[node]]
    pending = [source for node in readers for source in node.all_input_nodes]
    while pending:
        node = pending.pop()
        is_bound = Binding.LATENTS in times[node] or node.op == "get_attr" or _is_coefficients(node)
        if node in visited or is_bound:
            continue
        visited.add(node)
        if is_cheap(node) or is_kept_in_step(node):
            pending.extend(node.all_input_nodes)
        else:
            crossing.add(node)
    return [node for node in graph.nodes if node in crossing]


def layout(nodes: Iterable[fx.Node]) -> tuple[tuple[Entry, ...], int]:
    """Places of the nodes' values in one flat tensor, and its size, in elements."""
    entries, offset = [], 0
    for node in nodes:
        shape = tuple(tensor_of(node).shape)
        origin = origin_of(node)
        if origin is None:
            raise PassError(f"node {node.name} is of no captured program")
        entries.append(Entry(origin, offset, shape))
        offset += padded(prod(shape))
    return tuple(entries), offset


def padded(size: int) -> int:
    """`size` rounded up to the alignment."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def read_packed(graph: fx.Graph, nodes: Sequence[fx.Node], kind: Kind, name: str) -> None:
    """Replace nodes by views into one new flat input."""
    entries, size = layout(nodes)
    packed = add_input(graph, Value(name, kind, (size,), tensor_of(nodes[0]).dtype), nodes[0])
    set_layout(packed, entries)
    start = next(node for node in graph.nodes if node.op != "placeholder")
    for node, entry in zip(nodes, entries, strict=True):
        with graph.inserting_before(start):
            part = call(graph, aten.slice.Tensor, packed, 0, entry.offset, entry.offset + prod(entry.shape))
            value = call(graph, aten.view.default, part, list(entry.shape))
        node.replace_all_uses_with(value)


def own_results(graph: fx.Graph) -> None:
    """Copy results that lie in a packed input: the caller may write to them."""
    output = graph.output_node()
    for result in dict.fromkeys(output.all_input_nodes):
        if layout_of(memory_of(result)):
            with graph.inserting_before(output):
                copied = call(graph, aten.clone.default, result)
            output.replace_input_with(result, copied)


def _is_coefficients(node: fx.Node) -> bool:
    return node.op == "placeholder" and value_of(node).kind is Kind.COEFFICIENTS
