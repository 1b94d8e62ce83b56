"""Partially evaluate an annotated program with respect to one site pattern."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx
from typing_extensions import override

from recache_compile.errors import PassError
from recache_compile.ir.meta import describe_input, describe_outputs, set_result, tensor_of, values_of
from recache_compile.ir.program import SitePattern
from recache_compile.ir.value import Kind, Value
from recache_compile.passes.base import Pass, call
from recache_compile.passes.ops import CACHE_POINT, aten, memory_of, remove_dead_code


@dataclass(frozen=True, slots=True)
class Specialise(Pass):
    """Turn each cache point into what its entry of `pattern` says.

    Recomputed sites become extra results (the features to store).  Forecast sites become
    sum_j coefficients[j] * history[j], accumulated in float32, and everything that only
    they needed is dead and removed, inputs included.  Where a site has a base, the feature
    is the difference to it, taken in float32, and the forecast is added to it.

    Args:
        pattern: one entry per site: 0 = recompute, h >= 1 = forecast from h anchors.
    """

    pattern: SitePattern
    name: ClassVar[str] = "specialise"
    requires: ClassVar[tuple[str, ...]] = ("insert-cache-points",)

    @override
    def rewrite(self, module: fx.GraphModule) -> bool:
        graph = module.graph
        points = graph.find_nodes(op="call_function", target=CACHE_POINT)
        if len(points) != len(self.pattern):
            raise PassError(f"the pattern has {len(self.pattern)} entries, the graph {len(points)} cache sites")
        if any(self.pattern):
            weights = tensor_of(points[0]).new_empty((max(self.pattern),), dtype=torch.float32)
            coefficients = add_input(graph, weights, "coefficients", Kind.COEFFICIENTS)
        for point in points:
            site = site_of(point)
            if self.pattern[site]:
                forecast(graph, point, coefficients, self.pattern[site])
            else:
                store(graph, point)
            graph.erase_node(point)
        remove_dead_inputs(graph)
        return bool(points)


def site_of(point: fx.Node) -> int:
    """Number of the site that a cache point marks."""
    site = point.args[1]
    assert isinstance(site, int)
    return site


def base_of(point: fx.Node) -> fx.Node | None:
    """What the feature of a cache point is a difference to."""
    base = point.args[2] if len(point.args) > 2 else None
    assert base is None or isinstance(base, fx.Node)
    return base


def store(graph: fx.Graph, point: fx.Node) -> None:
    """Return the feature of a site in addition to the graph's results."""
    made, base, site = point.args[0], base_of(point), site_of(point)
    assert isinstance(made, fx.Node)
    point.replace_all_uses_with(made)
    output = graph.output_node()
    with graph.inserting_before(output):
        feature = made if base is None else difference(graph, made, base)
        given = {memory_of(result) for result in output.all_input_nodes} | set(graph.find_nodes(op="placeholder"))
        if memory_of(feature) in given:  # the caller may write there: the history keeps its own copy
            feature = call(graph, aten.clone.default, feature)
    value = Value.like(tensor_of(feature), f"feature_{site}", Kind.FEATURE, site=site)
    output.args = ([*output.args[0], feature],)  # type: ignore[misc]
    describe_outputs(output, (*values_of(output), value))


def forecast(graph: fx.Graph, point: fx.Node, coefficients: fx.Node, anchors: int) -> None:
    """Replace a cache point by the weighted sum of its history, and of its base."""
    site, base = site_of(point), base_of(point)
    feature, total = tensor_of(point), None
    for slot in range(anchors):
        name, held = f"history_{site}_{slot}", feature.new_empty(feature.shape)
        history = add_input(graph, held, name, Kind.HISTORY, site=site, slot=slot)
        with graph.inserting_before(point):
            weight = call(graph, aten.select.int, coefficients, 0, slot)
            term = call(graph, aten.mul.Tensor, widened(graph, history), weight)
            total = term if total is None else call(graph, aten.add.Tensor, total, term)
    assert total is not None
    with graph.inserting_before(point):
        if base is not None:
            total = call(graph, aten.add.Tensor, widened(graph, base), total)
        result = total if tensor_of(total).dtype == feature.dtype else call(graph, aten.to.dtype, total, feature.dtype)
    point.replace_all_uses_with(result)


def difference(graph: fx.Graph, value: fx.Node, base: fx.Node) -> fx.Node:
    """value - base, in the value's dtype."""
    dtype = tensor_of(value).dtype
    result = call(graph, aten.sub.Tensor, widened(graph, value), widened(graph, base))
    return result if tensor_of(result).dtype == dtype else call(graph, aten.to.dtype, result, dtype)


def widened(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """The node in float32 at least: half precision would lose what the weights' differences tell."""
    dtype = tensor_of(node).dtype
    wide = torch.promote_types(dtype, torch.float32)
    return node if wide == dtype else call(graph, aten.to.dtype, node, wide)


def add_input(graph: fx.Graph, traced: Tensor, name: str, kind: Kind, **facts: Any) -> fx.Node:
    """Append a placeholder for what is like a traced tensor."""
    last = graph.find_nodes(op="placeholder")[-1]
    with graph.inserting_after(last):
        node = graph.placeholder(name)
    describe_input(node, Value.like(traced, name, kind, **facts))
    set_result(node, traced)
    return node


def remove_dead_inputs(graph: fx.Graph) -> None:
    """Remove dead code and then the placeholders that nothing reads."""
    remove_dead_code(graph)
    for node in graph.find_nodes(op="placeholder"):
        if not node.users:
            graph.erase_node(node)
