"""Partially evaluate an annotated program with respect to one row of site kinds."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from recache_compile.errors import PassError
from recache_compile.passes.base import Pass, call
from recache_compile.passes.ops import CACHE_POINT, aten, memory_of, remove_dead_code
from recache_compile.program import Kind, Row, Value


@dataclass(frozen=True, slots=True)
class Specialise(Pass):
    """Turn each cache point into what its entry of `row` says.

    Recomputed sites become extra results (the features to store).  Forecast sites become
    sum_j coefficients[j] * history[j], accumulated in float32, and everything that only
    they needed is dead and removed, inputs included.

    Args:
        row: one entry per site: 0 = recompute, h >= 1 = forecast from h anchors.
    """

    row: Row
    name: ClassVar[str] = "specialise"
    requires: ClassVar[tuple[str, ...]] = ("insert-cache-points",)

    def rewrite(self, module: fx.GraphModule) -> bool:
        """See the class."""
        graph = module.graph
        points = graph.find_nodes(op="call_function", target=CACHE_POINT)
        if len(points) != len(self.row):
            raise PassError(f"the row has {len(self.row)} entries, the graph {len(points)} cache sites")
        if any(self.row):
            coefficients = add_input(
                graph, Value("coefficients", Kind.COEFFICIENTS, (max(self.row),), torch.float32), points[0]
            )
        for point in points:
            site = site_of(point)
            if self.row[site]:
                forecast(graph, point, coefficients, self.row[site])
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


def store(graph: fx.Graph, point: fx.Node) -> None:
    """Return the feature of a site in addition to the graph's results."""
    feature, site = point.all_input_nodes[0], site_of(point)
    output = graph.output_node()
    results = list(output.args[0])  # type: ignore[arg-type]
    given = {memory_of(result) for result in results} | set(graph.find_nodes(op="placeholder"))
    if memory_of(feature) in given or point in given:  # the caller may write there: the history keeps its own copy
        with graph.inserting_before(output):
            stored = call(graph, aten.clone.default, feature)
    else:
        stored = feature
    point.replace_all_uses_with(feature)
    shape, dtype = tuple(feature.meta["val"].shape), feature.meta["val"].dtype
    value = Value(f"feature_{site}", Kind.FEATURE, shape, dtype, site=site)
    output.args = ([feature if result is point else result for result in results] + [stored],)
    output.meta["values"] = (*output.meta["values"], value)


def forecast(graph: fx.Graph, point: fx.Node, coefficients: fx.Node, anchors: int) -> None:
    """Replace a cache point by the weighted sum of its history."""
    site, meta = site_of(point), point.meta["val"]
    total = None
    for slot in range(anchors):
        value = Value(f"history_{site}_{slot}", Kind.HISTORY, tuple(meta.shape), meta.dtype, site=site, slot=slot)
        history = add_input(graph, value, point)
        with graph.inserting_before(point):
            wide = call(graph, aten.to.dtype, history, torch.float32) if meta.dtype != torch.float32 else history
            weight = call(graph, aten.select.int, coefficients, 0, slot)
            term = call(graph, aten.mul.Tensor, wide, weight)
            total = term if total is None else call(graph, aten.add.Tensor, total, term)
    assert total is not None
    with graph.inserting_before(point):
        result = call(graph, aten.to.dtype, total, meta.dtype) if meta.dtype != torch.float32 else total
    point.replace_all_uses_with(result)


def add_input(graph: fx.Graph, value: Value, like: fx.Node) -> fx.Node:
    """Append a placeholder that carries `value`; `like` lends its fake mode and device."""
    last = graph.find_nodes(op="placeholder")[-1]
    with graph.inserting_after(last):
        node = graph.placeholder(value.name)
    node.meta["value"] = value
    node.meta["val"] = like.meta["val"].new_empty(value.shape, dtype=value.dtype)
    return node


def remove_dead_inputs(graph: fx.Graph) -> None:
    """Remove dead code and then the placeholders that nothing reads."""
    remove_dead_code(graph)
    for node in graph.find_nodes(op="placeholder"):
        if not node.users:
            graph.erase_node(node)
