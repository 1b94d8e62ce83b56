"""Give attention its queries, keys and values head by head."""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx
from typing_extensions import override

from recache_compile.ir.meta import tensor_of
from recache_compile.ir.sizes import number_of
from recache_compile.passes.base import Pass, call
from recache_compile.passes.ops import aten, packet

MIN_QUERIES = 128
"""Shorter attention does not repay a copy."""


@dataclass(frozen=True, slots=True)
class LayOutAttention(Pass):
    """Make the transposed arguments of attention dense: (batch, heads, tokens, channels) in this order in memory.

    Models compute them token by token and transpose.  On CPUs the rows of a head then lie a
    large power of two apart, which caches serve badly.  What wrote the value is compiled to
    write it in the other order; at worst it is copied once, and attention reads it many times.
    Repeated values (one head for several) stay as they are.

    Args:
        min_queries: number of query tokens from which it is done.
    """

    min_queries: int = MIN_QUERIES
    name: ClassVar[str] = "lay-out-attention"

    @override
    def rewrite(self, module: fx.GraphModule) -> bool:
        modified = False
        for node in list(module.graph.nodes):
            if packet(node) is aten.scaled_dot_product_attention and self._is_long(node):
                modified |= _lay_out(module.graph, node)
        return modified

    def _is_long(self, node: fx.Node) -> bool:
        query = tensor_of(node.args[0])
        return query.dim() == 4 and number_of(query.shape[2]) >= self.min_queries


def _lay_out(graph: fx.Graph, node: fx.Node) -> bool:
    """Make the query, key and value of one call dense; return whether one was not."""
    before = node.args
    with graph.inserting_before(node):
        node.args = tuple(_dense(graph, value) for value in before[:3]) + before[3:]
    return node.args != before


def _dense(graph: fx.Graph, value: Any) -> Any:
    tensor = tensor_of(value)
    is_repeated = any(stride == 0 and size > 1 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return value if tensor.is_contiguous() or is_repeated else call(graph, aten.contiguous.default, value)
