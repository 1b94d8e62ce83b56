"""Compute only those rows of a value that are read."""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx
from torch.utils import _pytree as pytree
from typing_extensions import override

from recache_compile.capture.compat import on_values
from recache_compile.errors import PassError
from recache_compile.ir.meta import result_of, set_result, tensor_of
from recache_compile.passes.base import Pass, call
from recache_compile.passes.ops import MATMULS, aten, packet, remove_dead_code
from recache_compile.passes.row_reads import Rows, arguments, is_tuple_read, part_of, reads_of, with_sizes
from recache_compile.passes.specialise import remove_dead_inputs

Demands = dict[fx.Node, Rows | None]
"""Which rows of a value are read, None: all of them; values that nothing reads are absent."""


@dataclass(frozen=True, slots=True)
class DropUnreadRows(Pass):
    """Move the slices that a model takes of its tokens in front of what computes these tokens.

    Models with text and picture in one sequence compute both in their last block and then drop
    the text: of that, only the keys and values are needed there.  The rows that are left are
    computed as before.  Where no matrix product becomes smaller, slices stay where they are.
    """

    name: ClassVar[str] = "drop-unread-rows"

    @override
    def rewrite(self, module: fx.GraphModule) -> bool:
        graph, size = module.graph, len(module.graph.nodes)
        remove_dead_code(graph)
        changes, kept = plan(graph)
        for change in changes:
            change.make(graph, kept)
        if changes:
            remove_dead_inputs(graph)
        return bool(changes) or len(graph.nodes) != size


@dataclass(frozen=True, slots=True)
class Change:
    """A call that reads less than before.

    Args:
        node: the call.
        rows: of its result that it makes; None: all.
        reads: its arguments, and the rows that it reads of each; None: everything.
        is_part: whether its result is nothing but these rows of its one argument.
    """

    node: fx.Node
    rows: Rows | None
    reads: tuple[tuple[fx.Node, Rows | None], ...]
    is_part: bool

    def make(self, graph: fx.Graph, kept: dict[fx.Node, Rows]) -> None:
        """Rewrite the call; `kept` tells what other values have become."""
        node, before = self.node, _shapes(self.node)
        if self.is_part:
            source, rows = self.reads[0]
            assert rows is not None
            start = rows.start - kept[source].start
            node.target, node.args, node.kwargs = aten.slice.Tensor, (source, rows.dim, start, start + rows.count), {}
        elif is_tuple_read(node):  # as many rows as the call that makes all of the tuple
            kept[node] = kept[self.reads[0][0]]
        else:
            self._read_less(graph, kept)
        _trace_again(node)
        if self.rows is not None:
            before = [(*shape[: self.rows.dim], self.rows.count, *shape[self.rows.dim + 1 :]) for shape in before]
        if _shapes(node) != before:
            raise PassError(f"node {node.name} would make {_shapes(node)} instead of {before}")

    def _read_less(self, graph: fx.Graph, kept: dict[fx.Node, Rows]) -> None:
        node, rows = self.node, self.rows
        assert rows is not None
        reads = iter(self.reads)
        given = (with_sizes(node, rows), node.kwargs)
        with graph.inserting_before(node):
            args, kwargs = pytree.tree_map_only(fx.Node, lambda _: _only(graph, *next(reads), kept), given)
        if packet(node) is aten.cat:
            args = ([piece for piece in args[0] if piece is not None], *args[1:])
        node.args, node.kwargs = args, kwargs


def plan(graph: fx.Graph) -> tuple[list[Change], dict[fx.Node, Rows]]:
    """What to rewrite, in the order of the graph, and the values of which only some rows are kept.

    They are those with which a matrix product becomes smaller.
    """
    demands = rows_read(graph)
    kept: dict[fx.Node, Rows] = {}
    changes = []
    for node in graph.nodes:
        if node.op != "call_function" or node not in demands:
            continue
        rows = demands[node]
        reads = _reads(node, rows)
        assert reads is not None
        is_part = _is_taken(node, rows)
        is_smaller = any(
            part and (argument in kept or not (is_part or argument in demands)) for argument, part in reads
        )
        if is_smaller or (rows is not None and packet(node) in MATMULS):
            changes.append(Change(node, rows, tuple(reads), is_part))
            if rows is not None:
                kept[node] = rows
    return changes, kept


def rows_read(graph: fx.Graph) -> Demands:
    """The rows of every value that are read, in a graph without dead code."""
    found: Demands = {}
    for node in reversed(graph.nodes):
        if node.op == "output":
            found.update(dict.fromkeys(node.all_input_nodes))
        elif node in found and node.op == "call_function":
            if (reads := _reads(node, found[node])) is None:
                found[node], reads = None, _reads(node, None)
            for argument, rows in reads or ():
                if rows is None or rows.count:
                    found[argument] = _joined(argument, rows, found.get(argument, rows))
    return found


def _reads(node: fx.Node, rows: Rows | None) -> list[tuple[fx.Node, Rows | None]] | None:
    """What a call reads to make these rows, or all, of its result; None: it cannot make these alone."""
    part = part_of(node)
    if part is not None and _is_taken(node, rows):
        return [(part[0], part[1] if rows is None else rows.within(part[1]))]
    if rows is None:
        return [(argument, None) for argument in arguments(node)]
    reads = reads_of(node, rows)
    return None if reads is None else list(zip(arguments(node), reads, strict=True))


def _is_taken(node: fx.Node, rows: Rows | None) -> bool:
    """Whether a call takes a part of a value, of which all or a smaller part along the same dimension is read."""
    part = part_of(node)
    return part is not None and (rows is None or rows.dim == part[1].dim)


def _joined(node: fx.Node, one: Rows | None, other: Rows | None) -> Rows | None:
    """Rows of a value that contain both; None: all of it."""
    if one is None or other is None or one.dim != other.dim:
        return None
    both = Rows(one.dim, min(one.start, other.start), max(one.stop, other.stop))
    value: Any = result_of(node)
    size = (value[0] if isinstance(value, (list, tuple)) else value).shape[both.dim]
    return None if both.count == size else both


def _only(graph: fx.Graph, node: fx.Node, rows: Rows | None, kept: dict[fx.Node, Rows]) -> fx.Node | None:
    """These rows of a value as it has become; None: there are none."""
    if rows is None:
        return node
    start = rows.start - (kept[node].start if node in kept else 0)
    if not rows.count:
        return None
    if rows.count == tensor_of(node).shape[rows.dim]:
        return node
    return call(graph, aten.slice.Tensor, node, rows.dim, start, start + rows.count)


def _shapes(node: fx.Node) -> list[tuple[int, ...]]:
    return [tuple(value.shape) for value in pytree.tree_leaves(result_of(node))]


def _trace_again(node: fx.Node) -> None:
    """Set the value of a call whose arguments have changed."""
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), result_of)
    with on_values(args):
        set_result(node, node.target(*args, **kwargs))  # type: ignore[operator]
