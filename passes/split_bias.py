"""Add the bias of a matrix product after it."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx
from typing_extensions import override

from recache_compile.ir.meta import tensor_of
from recache_compile.passes.base import Pass, call
from recache_compile.passes.ops import aten, packet


@dataclass(frozen=True, slots=True)
class SplitBias(Pass):
    """linear(x, W, b) becomes linear(x, W) + b, in float32.

    On CPUs a product with a bias first copies it into every row of the result, and then
    reads that back.  An addition of its own is fused into whatever reads the product.  Half
    types stay: they would be rounded once more in between.
    """

    name: ClassVar[str] = "split-bias"

    @override
    def rewrite(self, module: fx.GraphModule) -> bool:
        found = [node for node in module.graph.nodes if _has_bias(node)]
        for node in found:
            value, weight, bias = node.args
            with module.graph.inserting_before(node):
                product = call(module.graph, aten.linear.default, value, weight)
                node.replace_all_uses_with(call(module.graph, aten.add.Tensor, product, bias))
            module.graph.erase_node(node)
        return bool(found)


def _has_bias(node: fx.Node) -> bool:
    if packet(node) is not aten.linear or len(node.args) < 3 or node.args[2] is None:
        return False
    return bool(tensor_of(node).dtype is torch.float32)
