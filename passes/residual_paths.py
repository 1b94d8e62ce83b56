"""Follow a residual stream backwards: which value was it before the additions?"""

import operator
from collections import deque
from collections.abc import Callable
from typing import Any

from torch import Tensor, fx

from recache_compile.passes.ops import aten, packet

_SAME_VALUE = {aten.to, aten._to_copy, aten.clone, aten.contiguous, aten.dropout, aten.alias, aten.detach, aten.clamp}
_SPLITS = {aten.split, aten.split_with_sizes, aten.chunk, aten.tensor_split}

Window = tuple[int, int] | None
"""Part of a value along one dimension: (dimension, first element)."""


def residual_base(node: fx.Node, inside: Callable[[fx.Node], bool]) -> fx.Node | None:
    """The value outside of a region that reaches `node` through additions only, else None.

    Casts, clones and clamps are looked through, and so are slices of concatenations: a
    block may add to two streams at once.  Where several values do, the one in front wins:
    additions are written stream first.

    Args:
        node: a value made inside the region.
        inside: whether a node belongs to the region.
    """
    target = node.meta["val"]
    pending: deque[tuple[fx.Node, Window]] = deque([(node, None)])
    visited: set[tuple[fx.Node, Window]] = set()
    while pending:
        state = pending.popleft()
        this, window = state
        if state in visited or not isinstance(this.meta.get("val"), Tensor):
            continue
        visited.add(state)
        if not inside(this):
            value = this.meta["val"]
            if window is None and value.shape == target.shape and value.is_floating_point():
                return this
            continue
        pending.extend(_before(this, window))
    return None


def _before(node: fx.Node, window: Window) -> list[tuple[fx.Node, Window]]:
    """What `node` continues, by addition or as it is."""
    if node.op != "call_function":
        return []
    kind = packet(node)
    if kind in _SAME_VALUE:
        return [(node.all_input_nodes[0], window)]
    if kind is aten.add and "alpha" not in node.kwargs:
        shape = node.meta["val"].shape
        return [(source, window) for source in node.all_input_nodes if source.meta["val"].shape == shape]
    if kind is aten.slice and window is None:
        source, dim, start, *_ = (*node.args, 0, 0)
        return [(source, _positive(source, dim, start))]  # type: ignore[list-item, arg-type]
    if kind is aten.cat and window is not None:
        return _member(node, window)
    if node.target is operator.getitem and window is None:
        return _part(node)
    return []


def _positive(source: Any, dim: int, start: int | None) -> Window:
    value = source.meta["val"]
    dim, start = dim % value.dim(), start or 0
    return (dim, start + value.shape[dim] if start < 0 else start)


def _member(node: fx.Node, window: tuple[int, int]) -> list[tuple[fx.Node, Window]]:
    """The member of a concatenation that begins where the window does."""
    dim, start = window
    own = (node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)) % node.meta["val"].dim()  # type: ignore[operator]
    offset = 0
    for member in node.all_input_nodes if own == dim else ():
        if offset == start:
            return [(member, None)]
        offset += member.meta["val"].shape[dim]
    return []


def _part(node: fx.Node) -> list[tuple[fx.Node, Window]]:
    """A member of a split is a window into what was split."""
    split, index = node.all_input_nodes[0], int(node.args[1])  # type: ignore[arg-type]
    if packet(split) not in _SPLITS:
        return []
    source = split.all_input_nodes[0]
    dim = split.args[2] if len(split.args) > 2 else split.kwargs.get("dim", 0)
    sizes = [part.shape[dim] for part in split.meta["val"]]  # type: ignore[index]
    return [(source, _positive(source, dim, sum(sizes[:index])))]  # type: ignore[arg-type, misc]
