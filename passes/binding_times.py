"""Binding-time analysis: what does every value depend on?"""

from torch import fx

from recache_compile.ir.meta import value_of
from recache_compile.ir.program import Binding
from recache_compile.ir.value import Kind
from recache_compile.passes.ops import SIZES, is_random, packet

_OF_KIND = {
    Kind.TIMESTEP: Binding.TIMESTEP,
    Kind.TABLE_ROW: Binding.TIMESTEP,
    Kind.CONDITIONING: Binding.CONDITIONING,
    Kind.FIXED: Binding.CONDITIONING,
    Kind.COEFFICIENTS: Binding.TIMESTEP,
    Kind.LATENTS: Binding.LATENTS,
    Kind.HISTORY: Binding.LATENTS,
    Kind.SHAPE: Binding.NOTHING,
}


def binding_times(graph: fx.Graph) -> dict[fx.Node, Binding]:
    """The union of the bindings of everything a node is computed from.

    Weights depend on nothing, and nor does the shape of a value.  Random draws count as latents:
    they must not be shared by the steps.  (Partial evaluation in the sense of Jones, Gomard and Sestoft, 1993.)
    """
    times: dict[fx.Node, Binding] = {}
    for node in graph.nodes:
        if node.op == "placeholder":
            times[node] = _OF_KIND[value_of(node).kind]
            continue
        time = Binding.LATENTS if is_random(node) else Binding.NOTHING
        for source in () if packet(node) in SIZES else node.all_input_nodes:
            time |= times[source]
        times[node] = time
    return times
