"""The `recache` operators and the operator classes that passes reason about."""

import operator

import torch
from torch import Tensor, fx

from recache_compile.capture.compat import writes
from recache_compile.ir.meta import result_of

aten = torch.ops.aten


@torch.library.custom_op("recache::cache_point", mutates_args=())
def cache_point(value: Tensor, site: int, base: Tensor | None = None) -> Tensor:
    """Mark `value` as a cache site; specialisation replaces the mark.

    The feature is `value`, or its difference to `base`.
    """
    return value.clone()


@cache_point.register_fake
def _(value: Tensor, site: int, base: Tensor | None = None) -> Tensor:
    return torch.empty_like(value)


CACHE_POINT = torch.ops.recache.cache_point.default

MATMULS = {
    aten.linear,
    aten.matmul,
    aten.mm,
    aten.bmm,
    aten.addmm,
    aten.baddbmm,
    aten.einsum,
    aten.convolution,
    aten.conv1d,
    aten.conv2d,
    aten.conv3d,
    aten.scaled_dot_product_attention,
}
"""Operators that carry a model's multiply-accumulates."""

VIEWS = {
    aten.view,
    aten.reshape,
    aten._unsafe_view,
    aten.unsqueeze,
    aten.squeeze,
    aten.slice,
    aten.select,
    aten.narrow,
    aten.chunk,
    aten.split,
    aten.split_with_sizes,
    aten.unbind,
    aten.transpose,
    aten.permute,
    aten.t,
    aten.expand,
    aten.expand_as,
    aten.flatten,
    aten.unflatten,
    aten.movedim,
}
"""Operators that move no data (or at most copy what they are given)."""

SCALAR_MATH = {aten.add, aten.sub, aten.rsub, aten.mul, aten.div, aten.neg, aten.to, aten._to_copy, aten.clone}
"""Arithmetic that compilers fuse into its reader, when only one operand is a tensor."""

SIZES = {aten.sym_size, aten.sym_stride, aten.sym_numel}
"""Operators that tell of a value's shape, which is known whatever it holds."""

FILLS = {aten.full, aten.zeros, aten.ones, aten.scalar_tensor}
"""Operators that write one number everywhere."""


def packet(node: fx.Node) -> object:
    """The overload packet of an ATen call (`aten.add` for `aten.add.Tensor`), else the target itself."""
    return getattr(node.target, "overloadpacket", node.target)


def is_size(node: fx.Node) -> bool:
    """Whether a call makes a number of the sizes of values, and no tensor."""
    return node.op == "call_function" and isinstance(result_of(node), (int, torch.SymInt, torch.SymBool))


def is_cheap(node: fx.Node) -> bool:
    """Whether a call is a fill, a view or arithmetic on one tensor: repeating it costs less than storing its result."""
    if packet(node) in FILLS:
        return True
    if node.op != "call_function" or len(node.all_input_nodes) != 1:
        return False
    if node.target is operator.getitem:
        return packet(node.all_input_nodes[0]) in VIEWS
    return packet(node) in VIEWS or packet(node) in SCALAR_MATH


def is_off(dropout: fx.Node) -> bool:
    """Whether a dropout call returns what it is given."""
    return bool(dropout.args[2] is False or dropout.args[1] == 0.0)


def is_random(node: fx.Node) -> bool:
    """Whether a call draws random numbers; attention and dropout do so only with a probability."""
    if torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()):
        return False
    if packet(node) is aten.scaled_dot_product_attention:
        probability = node.args[4] if len(node.args) > 4 else node.kwargs.get("dropout_p", 0.0)
        return bool(probability != 0.0)
    if packet(node) is aten.dropout:
        return not is_off(node)
    return True


def remove_dead_code(graph: fx.Graph) -> None:
    """Remove calls whose result is not used, unless they write to an argument."""
    graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output") or writes(node))


def memory_of(node: fx.Node) -> fx.Node:
    """The node whose memory a value may lie in: views, and calls that may return their argument, share it."""
    while node.op == "call_function" and node.all_input_nodes:
        schema = getattr(node.target, "_schema", None)
        shares = node.target is operator.getitem or (
            schema is not None and any(result.alias_info is not None for result in schema.returns)
        )
        if not shares:
            break
        node = node.all_input_nodes[0]
    return node
