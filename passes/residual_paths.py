"""Follow a residual stream backwards: which value was it before the additions?"""

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, fx

from recache_compile.ir.meta import result_of, tensor_of
from recache_compile.ir.sizes import term_of, terms_of
from recache_compile.passes.ops import aten, packet

_SAME_VALUE = {
    aten.to,
    aten._to_copy,
    aten.clone,
    aten.contiguous,
    aten.dropout,
    aten.alias,
    aten.detach,
    aten.clamp,
    aten.clip,
}
_SPLITS = {aten.split, aten.split_with_sizes, aten.chunk, aten.tensor_split}


class StreamSlice(NamedTuple):
    """Of two values one is a part of the other, along a dimension from an element on.

    Args:
        dim: the dimension.
        start: the first element, as a term.
        within: the followed value is a part of the node's; otherwise it is the other way round.
    """

    dim: int
    start: Any
    within: bool = True


def residual_base(node: fx.Node, inside: Callable[[fx.Node], bool]) -> fx.Node | None:
    """The value outside of a region that reaches `node` through additions only, else None.

    Casts, clones and clamps are looked through, and so are slices of concatenations (a
    block may add to two streams at once) and concatenations of slices (it may add to one part
    of a stream).  A slice of a value from outside counts as one from outside.  Where several
    values do, the one in front wins: additions are written stream first.

    Args:
        node: a value made inside the region.
        inside: whether a node belongs to the region.
    """
    target = tensor_of(node)
    pending: list[tuple[fx.Node, StreamSlice | None]] = [(node, None)]
    visited: set[tuple[fx.Node, StreamSlice | None]] = set()
    while pending:
        state = pending.pop()
        this, window = state
        value = result_of(this)
        if state in visited or not isinstance(value, Tensor):
            continue
        visited.add(state)
        before = _before(this, window) if inside(this) else []
        is_slice = any(after is not None and after.within and not inside(source) for source, after in before)
        if inside(this) and not is_slice:
            pending.extend(reversed(before))
        elif window is None and terms_of(value.shape) == terms_of(target.shape) and value.is_floating_point():
            return this
    return None


def _before(node: fx.Node, window: StreamSlice | None) -> list[tuple[fx.Node, StreamSlice | None]]:
    """What `node` continues, by addition or as it is."""
    if node.op != "call_function":
        return []
    kind = packet(node)
    if kind in _SAME_VALUE:
        return [(node.all_input_nodes[0], window)]
    if kind is aten.add and "alpha" not in node.kwargs:
        shape = terms_of(tensor_of(node).shape)
        return [(source, window) for source in node.all_input_nodes if terms_of(tensor_of(source).shape) == shape]
    if kind is aten.slice:
        source, dim, start, *_ = (*node.args, 0, 0)
        return _of_larger(source, dim, term_of(result_of(start)) if isinstance(start, fx.Node) else start, window)
    if kind is aten.cat:
        return _of_parts(node, window)
    if node.target is operator.getitem and packet(node.all_input_nodes[0]) in _SPLITS:
        return _of_split(node, window)
    return []


def _of_larger(
    source: Any, dim: Any, start: Any, window: StreamSlice | None
) -> list[tuple[fx.Node, StreamSlice | None]]:
    """A slice of `source`: the value is a part of it, or was its part to begin with."""
    shape = tensor_of(source).shape
    dim, start = dim % len(shape), start or 0
    start = start + term_of(shape[dim]) if isinstance(start, int) and start < 0 else start
    if window is None:
        return [(source, StreamSlice(dim, start))]
    return [(source, None)] if window == StreamSlice(dim, start, within=False) else []


def _of_parts(node: fx.Node, window: StreamSlice | None) -> list[tuple[fx.Node, StreamSlice | None]]:
    """A concatenation: the member that begins where the window does, or all of them as parts."""
    dim: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    members: Any = node.args[0]
    dim, offset = dim % tensor_of(node).dim(), 0
    found: list[tuple[fx.Node, StreamSlice | None]] = []
    for member in members:
        if window is None:
            found.append((member, StreamSlice(dim, offset, within=False)))
        elif window == StreamSlice(dim, offset):
            return [(member, None)]
        offset += term_of(tensor_of(member).shape[dim])
    return found


def _of_split(node: fx.Node, window: StreamSlice | None) -> list[tuple[fx.Node, StreamSlice | None]]:
    """A member of a split is a slice."""
    split, index = node.all_input_nodes[0], int(node.args[1])  # type: ignore[arg-type]
    source = split.all_input_nodes[0]
    dim: Any = split.args[2] if len(split.args) > 2 else split.kwargs.get("dim", 0)
    sizes = [term_of(part.shape[dim]) for part in result_of(split)]
    return _of_larger(source, dim, sum(sizes[:index]), window)
