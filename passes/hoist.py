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
from recache_compile.ir.sizes import bytes_of, is_free, number_of
from recache_compile.ir.value import Kind
from recache_compile.passes.base import Pass, call
from recache_compile.passes.binding_times import binding_times
from recache_compile.passes.ops import aten, is_cheap, is_size, memory_of
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
    `build_prologue`.  A value with a free size is an input of its own, in its own shape.

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
            single = [node for node in timely if has_free_size(node)]
            packed = [node for node in timely if node not in single]
            for number, node in enumerate(single):
                read_single(graph, node, kind, f"{prefix}_{number}")
            for dtype in dict.fromkeys(tensor_of(node).dtype for node in packed):
                members = [node for node in packed if tensor_of(node).dtype == dtype]
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
        if row_bytes is None or not movable or sum(map(_bytes, rows)) <= row_bytes:
            return crossing
        keep_in_step(max(movable, key=_bytes))


def _bytes(node: fx.Node) -> int:
    return bytes_of(tensor_of(node))


def boundary(graph: fx.Graph, times: Mapping[fx.Node, Binding]) -> list[fx.Node]:
    """The latents-independent values that a step must be given, in graph order."""
    crossing: set[fx.Node] = set()
    visited: set[fx.Node] = set()
    readers = [node for node in graph.nodes if node.op == "output" or Binding.LATENTS in times[node]]
    pending = [source for node in readers for source in node.all_input_nodes]
    while pending:
        node = pending.pop()
        is_bound = Binding.LATENTS in times[node] or node.op == "get_attr" or _is_coefficients(node) or is_size(node)
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
        entries.append(Entry(_origin(node), offset, shape))
        offset += padded(prod(shape))
    return tuple(entries), offset


def _origin(node: fx.Node) -> int:
    origin = origin_of(node)
    if origin is None:
        raise PassError(f"node {node.name} is of no captured program")
    return origin


def padded(size: int) -> int:
    """`size` rounded up to the alignment."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def read_packed(graph: fx.Graph, nodes: Sequence[fx.Node], kind: Kind, name: str) -> None:
    """Replace nodes by views into one new flat input."""
    entries, size = layout(nodes)
    packed = add_input(graph, tensor_of(nodes[0]).new_empty((size,)), name, kind)
    set_layout(packed, entries)
    start = next(node for node in graph.nodes if node.op != "placeholder")
    for node, entry in zip(nodes, entries, strict=True):
        with graph.inserting_before(start):
            part = call(graph, aten.slice.Tensor, packed, 0, entry.offset, entry.offset + prod(entry.shape))
            value = call(graph, aten.view.default, part, list(entry.shape))
        node.replace_all_uses_with(value)


def has_free_size(node: fx.Node) -> bool:
    """Whether a size of a value is no number."""
    return any(map(is_free, tensor_of(node).shape))


def read_single(graph: fx.Graph, node: fx.Node, kind: Kind, name: str) -> None:
    """Replace a node by a new input of its shape."""
    value = tensor_of(node)
    given = add_input(graph, value.new_empty(value.shape), name, kind)
    set_layout(given, [Entry(_origin(node), 0, tuple(map(number_of, value.shape)))])
    node.replace_all_uses_with(given)


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
