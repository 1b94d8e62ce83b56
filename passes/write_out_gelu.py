"""Write the tanh form of GELU as a product with a sigmoid."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx
from typing_extensions import override

from recache_compile.ir.meta import tensor_of
from recache_compile.passes.base import Pass, call
from recache_compile.passes.ops import aten, packet

_HALVES = (torch.bfloat16, torch.float16)
_LINEAR = 2 * math.sqrt(2 / math.pi)
_CUBIC = 0.044715 * _LINEAR


@dataclass(frozen=True, slots=True)
class WriteOutGelu(Pass):
    """gelu(x) = x/2 * (1 + tanh u) becomes x * sigmoid(2u), u = sqrt(2/pi) * (x + 0.044715 x^3): the same function.

    The vectorised tanh that C++ compilers are given on CPUs takes several times as long as
    the exponential in a sigmoid, so much that it shows beside the matrix products.  Half
    types are computed in float32, as the operator does.  The exact form (erf) stays.
    """

    name: ClassVar[str] = "write-out-gelu"

    @override
    def rewrite(self, module: fx.GraphModule) -> bool:
        found = [node for node in module.graph.nodes if _is_tanh_gelu(node)]
        for node in found:
            with module.graph.inserting_before(node):
                node.replace_all_uses_with(_written_out(module.graph, node))
            module.graph.erase_node(node)
        return bool(found)


def _is_tanh_gelu(node: fx.Node) -> bool:
    return bool(packet(node) is aten.gelu and node.kwargs.get("approximate") == "tanh")


def _written_out(graph: fx.Graph, gelu: fx.Node) -> fx.Node:
    (given,) = gelu.all_input_nodes
    dtype = tensor_of(given).dtype
    value = call(graph, aten.to.dtype, given, torch.float32) if dtype in _HALVES else given
    square = call(graph, aten.mul.Tensor, value, value)
    slope = call(graph, aten.add.Tensor, call(graph, aten.mul.Tensor, square, _CUBIC), _LINEAR)
    gate = call(graph, aten.sigmoid.default, call(graph, aten.mul.Tensor, value, slope))
    result = call(graph, aten.mul.Tensor, value, gate)
    return call(graph, aten.to.dtype, result, dtype) if dtype in _HALVES else result
