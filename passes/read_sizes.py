"""Read free sizes where they are at hand."""

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import fx
from typing_extensions import override

from recache_compile.ir.meta import describe_input, result_of, tensor_of, value_of
from recache_compile.ir.sizes import is_free, term_of
from recache_compile.ir.value import Kind
from recache_compile.passes.base import Pass
from recache_compile.passes.ops import aten, packet
from recache_compile.passes.specialise import remove_dead_inputs


@dataclass(frozen=True, slots=True)
class ReadSizes(Pass):
    """Let a program take free sizes from inputs whose values it reads anyway.

    What is left of the model's inputs for the sake of their sizes alone becomes of kind SHAPE: its
    values do not matter.
    """

    name: ClassVar[str] = "read-sizes"

    @override
    def rewrite(self, module: fx.GraphModule) -> bool:
        graph = module.graph
        inputs = graph.find_nodes(op="placeholder")
        idle = [node for node in inputs if node.users and all(packet(user) is aten.sym_size for user in node.users)]
        read = [node for node in inputs if node not in idle]
        for size in [user for node in idle for user in node.users]:
            term = term_of(result_of(size))
            place = next(
                ((node, at) for node in read for at, each in enumerate(tensor_of(node).shape) if _is(each, term)), None
            )
            if place is not None:
                size.args = place
        remove_dead_inputs(graph)
        for node in idle:
            if node.users:
                describe_input(node, replace(value_of(node), kind=Kind.SHAPE))
        return bool(idle)


def _is(size: object, term: object) -> bool:
    return is_free(size) and term_of(size) == term
