"""Which part of its arguments a call reads to make some rows of its result: along one dimension, from here to there."""

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from recache_compile.capture.compat import arguments_of
from recache_compile.ir.meta import result_of, tensor_of
from recache_compile.passes.ops import aten, is_random, packet


@dataclass(frozen=True, slots=True)
class Rows:
    """Part of a value: its indices from `start` to `stop` along `dim`."""

    dim: int
    start: int
    stop: int

    @property
    def count(self) -> int:
        """How many they are."""
        return self.stop - self.start

    def at(self, dim: int) -> "Rows":
        """The same rows along another dimension."""
        return replace(self, dim=dim)

    def within(self, outer: "Rows") -> "Rows":
        """These rows of `outer`, as rows of what that is a part of."""
        return Rows(self.dim, outer.start + self.start, outer.start + self.stop)


Reads = Sequence[Rows | None]
"""For every argument that is a node, in order: the rows that are read, no rows at all, or None: everything."""


def arguments(node: fx.Node) -> list[fx.Node]:
    """The nodes among a call's arguments, one that is there twice counts twice."""
    return [leaf for leaf in pytree.tree_leaves((node.args, node.kwargs)) if isinstance(leaf, fx.Node)]


def reads_of(node: fx.Node, rows: Rows) -> Reads | None:
    """What a call reads to make `rows` of its result; None: it can only make all of it, as far as we know."""
    if not _sizes_are_known(node) or is_random(node):
        return None
    if is_tuple_read(node):
        return [rows]
    if rule := RULES.get(packet(node)):
        return rule(node, rows)
    return _pointwise(node, rows) if torch.Tag.pointwise in getattr(node.target, "tags", ()) else None


def part_of(node: fx.Node) -> tuple[fx.Node, Rows] | None:
    """What a node is a part of, and which; None: it is no such part."""
    if not _sizes_are_known(node):
        return None
    if packet(node) is aten.slice:
        given = arguments_of(node)
        source, dim = given["self"], given["dim"] % tensor_of(given["self"]).dim()
        start, stop, _ = slice(given["start"], given["end"]).indices(tensor_of(source).shape[dim])
        return (source, Rows(dim, start, max(start, stop))) if given["step"] == 1 else None
    cut: Any = node.args[0] if is_tuple_read(node) else None
    if cut is None or packet(cut) not in (aten.chunk, aten.split, aten.split_with_sizes):
        return None
    source, dim = cut.args[0], _dim(cut, arguments_of(cut)["dim"])
    sizes = [piece.shape[dim] for piece in result_of(cut)]
    number: Any = node.args[1]
    start = sum(sizes[:number])
    return source, Rows(dim, start, start + sizes[number])


def is_tuple_read(node: fx.Node) -> bool:
    """Whether a node is one of several results of a call."""
    return node.target is operator.getitem


def _sizes_are_known(node: fx.Node) -> bool:
    values = [result_of(each) for each in (node, *node.all_input_nodes)]
    return all(isinstance(size, int) for value in pytree.tree_leaves(values) for size in getattr(value, "shape", ("",)))


def _dim(node: fx.Node, dim: int) -> int:
    """A dimension of a call's first argument, counted from the front."""
    return dim % tensor_of(arguments(node)[0]).dim()


def _first(node: fx.Node, rows: Rows) -> Reads:
    """These rows of the first argument, and the others whole."""
    return [rows, *[None] * (len(arguments(node)) - 1)]


def _pointwise(node: fx.Node, rows: Rows) -> Reads:
    return [_broadcast(argument, tensor_of(node), rows) for argument in arguments(node)]


def _broadcast(argument: fx.Node, result: Tensor, rows: Rows) -> Rows | None:
    """The rows of an argument that is broadcast to a result; None where it has one row for all."""
    value = tensor_of(argument)
    at = rows.dim - (result.dim() - value.dim())
    return rows.at(at) if at >= 0 and value.shape[at] == result.shape[rows.dim] else None


def _linear(node: fx.Node, rows: Rows) -> Reads | None:
    return _first(node, rows) if rows.dim < tensor_of(node).dim() - 1 else None


def _matmul(node: fx.Node, rows: Rows) -> Reads | None:
    left, right = (tensor_of(argument).dim() for argument in arguments(node))
    return [rows, None] if left >= max(2, right) and rows.dim == left - 2 else None


def _norm(node: fx.Node, rows: Rows) -> Reads | None:
    """Norms over the last dimensions."""
    over: Any = node.args[1]
    return _first(node, rows) if rows.dim < tensor_of(node).dim() - len(over) else None


def _softmax(node: fx.Node, rows: Rows) -> Reads | None:
    return _first(node, rows) if rows.dim != _dim(node, arguments_of(node)["dim"]) else None


def _mean(node: fx.Node, rows: Rows) -> Reads | None:
    given = arguments_of(node)
    over = [_dim(node, dim) for dim in given["dim"] or range(tensor_of(node).dim())]
    return [rows] if given["keepdim"] and rows.dim not in over else None


def _attention(node: fx.Node, rows: Rows) -> Reads | None:
    """Rows of the result are rows of the queries, and of a mask that has one for each."""
    given, result = arguments_of(node), tensor_of(node)
    if rows.dim != result.dim() - 2 or given["is_causal"] or not isinstance(given["query"], fx.Node):
        return None
    mask = given["attn_mask"]
    if mask is None:
        return [rows, None, None]
    at = tensor_of(mask).dim() - 2
    return [rows, None, None, rows.at(at) if at >= 0 and tensor_of(mask).shape[at] > 1 else None]


def _reshape(node: fx.Node, rows: Rows) -> Reads | None:
    """A dimension that a reshape leaves alone: of the same size, with as many elements before it."""
    before, after = tensor_of(arguments(node)[0]).shape, tensor_of(node).shape
    for dim, size in enumerate(before):
        if size == after[rows.dim] and prod(before[:dim]) == prod(after[: rows.dim]):
            return [rows.at(dim)]
    return None


def _named_reshape(node: fx.Node, rows: Rows) -> Reads | None:
    """The same for calls that name the dimensions which they change: the sizes of the others stand nowhere."""
    given = _reshape(node, rows)
    if given is None or packet(node) is not aten.unflatten:
        return given
    dim, sizes = _dim(node, arguments_of(node)["dim"]), arguments_of(node)["sizes"]
    return None if dim <= rows.dim < dim + len(sizes) else given


def _squeeze(node: fx.Node, rows: Rows) -> Reads | None:
    """The same; the dimension itself would go where only one of its rows is left."""
    given = _reshape(node, rows)
    if given is None or rows.count > 1:
        return given
    dims = arguments_of(node).get("dim", range(tensor_of(arguments(node)[0]).dim()))
    gone = [_dim(node, dim) for dim in ([dims] if isinstance(dims, int) else dims)]
    return None if any(read is not None and read.dim in gone for read in given) else given


def _permute(node: fx.Node, rows: Rows) -> Reads:
    dims: Any = node.args[1]
    return [rows.at(_dim(node, dims[rows.dim]))]


def _transpose(node: fx.Node, rows: Rows) -> Reads:
    one, other = (_dim(node, dim) for dim in node.args[1:3])  # type: ignore[arg-type]
    return [rows.at({one: other, other: one}.get(rows.dim, rows.dim))]


def _expand(node: fx.Node, rows: Rows) -> Reads:
    return [_broadcast(arguments(node)[0], tensor_of(node), rows)]


def _cut(node: fx.Node, rows: Rows) -> Reads | None:
    """Parts along another dimension have the same rows; those along this one are seen by `part_of`."""
    return [rows] if rows.dim != _dim(node, arguments_of(node)["dim"]) else None


def _taken_apart(node: fx.Node, rows: Rows) -> Reads:
    """The result has one dimension less."""
    dim = _dim(node, arguments_of(node)["dim"])
    return [rows.at(rows.dim + (rows.dim >= dim))]


def _stack(node: fx.Node, rows: Rows) -> Reads | None:
    dim = arguments_of(node)["dim"] % tensor_of(node).dim()
    return None if rows.dim == dim else [rows.at(rows.dim - (rows.dim > dim))] * len(arguments(node))


def _cat(node: fx.Node, rows: Rows) -> Reads | None:
    pieces = arguments(node)
    if any(tensor_of(piece).dim() != tensor_of(node).dim() for piece in pieces):
        return None  # an empty piece may have any rank
    if rows.dim != _dim(node, arguments_of(node)["dim"]):
        return [rows] * len(pieces)
    found, offset = [], 0
    for piece in pieces:
        size = tensor_of(piece).shape[rows.dim]
        start, stop = (min(max(at - offset, 0), size) for at in (rows.start, rows.stop))
        found.append(Rows(rows.dim, start, stop))
        offset += size
    return found


RULES: dict[object, Callable[[fx.Node, Rows], Reads | None]] = {
    **dict.fromkeys((aten.to, aten._to_copy, aten.clone, aten.contiguous), _first),
    aten.linear: _linear,
    **dict.fromkeys((aten.matmul, aten.mm, aten.bmm), _matmul),
    **dict.fromkeys((aten.layer_norm, aten.rms_norm), _norm),
    **dict.fromkeys((aten.softmax, aten._softmax), _softmax),
    aten.mean: _mean,
    aten.scaled_dot_product_attention: _attention,
    aten.reshape: _reshape,
    **dict.fromkeys((aten.flatten, aten.unflatten, aten.unsqueeze), _named_reshape),
    aten.squeeze: _squeeze,
    aten.permute: _permute,
    aten.transpose: _transpose,
    aten.expand: _expand,
    **dict.fromkeys((aten.slice, aten.chunk, aten.split, aten.split_with_sizes), _cut),
    **dict.fromkeys((aten.select, aten.unbind), _taken_apart),
    aten.stack: _stack,
    aten.cat: _cat,
}
"""By operator; those that work element by element need none."""


def with_sizes(node: fx.Node, rows: Rows) -> tuple[Any, ...]:
    """The arguments of a call that makes only `rows` of its result, where sizes are among them."""
    if packet(node) not in (aten.reshape, aten.expand):
        return node.args
    sizes = list(tensor_of(node).shape)
    sizes[rows.dim] = rows.count
    return (node.args[0], sizes, *node.args[2:])
