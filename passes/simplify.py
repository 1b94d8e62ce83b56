"""Remove what an exported graph carries but inference does not need."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx
from typing_extensions import override

from recache_compile.capture.compat import arguments_of
from recache_compile.ir.meta import tensor_of
from recache_compile.ir.sizes import is_free, term_of, terms_of
from recache_compile.passes.base import Pass
from recache_compile.passes.ops import aten, is_off, is_random, packet, remove_dead_code
from recache_compile.passes.row_reads import Rows, arguments, part_of

_IDENTITIES = {aten.detach, aten.alias, aten.lift_fresh_copy, aten.detach_}
_CASTS = {aten.to, aten._to_copy, aten.contiguous, aten.type_as}
_RESHAPES = {aten.slice, aten.view, aten.reshape, aten._unsafe_view, aten.expand}
_CHECKS = {aten._assert_tensor_metadata, aten._assert_async, aten._assert_scalar, aten.sym_constrain_range_for_size}


@dataclass(frozen=True, slots=True)
class Simplify(Pass):
    """Drop identities, no-op casts and reshapes, inference-time dropout and checks; merge equal calls; no dead code.

    What is cut into parts and joined again is what it was.
    """

    name: ClassVar[str] = "simplify"

    @override
    def rewrite(self, module: fx.GraphModule) -> bool:
        removed = remove_identities(module.graph) | join_parts(module.graph)
        merged = merge_equal_calls(module.graph)
        before = len(module.graph.nodes)
        remove_dead_code(module.graph)
        return removed or merged or len(module.graph.nodes) != before


def remove_identities(graph: fx.Graph) -> bool:
    """Replace calls that return their first argument unchanged by that argument; erase checks."""
    modified = False
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        if _returns_its_argument(node):
            node.replace_all_uses_with(node.args[0])
        elif packet(node) not in _CHECKS or node.users:
            continue
        graph.erase_node(node)
        modified = True
    return modified


def join_parts(graph: fx.Graph) -> bool:
    """Replace what joins all parts of a value, in order, by that value; not where it is a result itself."""
    modified = False
    for node in list(graph.nodes):
        whole = _whole(node) if packet(node) is aten.cat else None
        if whole is not None and graph.output_node() not in node.users:
            node.replace_all_uses_with(whole)
            graph.erase_node(node)
            modified = True
    return modified


def _whole(cat: fx.Node) -> fx.Node | None:
    """The value whose parts a call joins, all of them and in order."""
    rank = tensor_of(cat).dim()
    dim, source, end = arguments_of(cat)["dim"] % rank, None, 0
    for piece in arguments(cat):
        if tensor_of(piece).dim() != rank:
            return None  # an empty piece may have any
        if is_free(tensor_of(piece).shape[dim]):
            return None
        part = part_of(piece) or (piece, Rows(dim, 0, tensor_of(piece).shape[dim]))
        if source not in (None, part[0]) or (part[1].dim, part[1].start) != (dim, end):
            return None
        source, end = part[0], part[1].stop
    return source if source is not None and term_of(tensor_of(source).shape[dim]) == end else None


def merge_equal_calls(graph: fx.Graph) -> bool:
    """Common subexpressions: the second of two equal calls reads the result of the first.

    Positions that a model computes in every block become one value.
    """
    modified = False
    seen: dict[Any, fx.Node] = {}
    for node in list(graph.nodes):
        if node.op not in ("call_function", "get_attr") or is_random(node):
            continue
        key = (node.op, node.target, _hashable(node.args), _hashable(node.kwargs))
        first = seen.setdefault(key, node)
        if first is not node:
            node.replace_all_uses_with(first)
            graph.erase_node(node)
            modified = True
    return modified


def _returns_its_argument(node: fx.Node) -> bool:
    if packet(node) in _IDENTITIES:
        return True
    if packet(node) is aten.dropout:
        return is_off(node)
    if packet(node) not in _CASTS | _RESHAPES:
        return False
    before, after = tensor_of(node.args[0]), tensor_of(node)  # type: ignore[union-attr]
    if packet(node) in _RESHAPES:
        return terms_of(before.shape) == terms_of(after.shape) and before.dtype == after.dtype
    return _layout(before) == _layout(after) and node.kwargs.get("copy") is not True


def _layout(value: Tensor) -> tuple[Any, ...]:
    return value.dtype, value.device, terms_of(value.shape), terms_of(value.stride())


def _hashable(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return tuple(_hashable(item) for item in value)
    if isinstance(value, dict):
        return tuple((key, _hashable(item)) for key, item in value.items())
    if isinstance(value, torch.Tensor):
        return id(value)
    return (type(value), value)
