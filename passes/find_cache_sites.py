"""Decide which values of the graph are cached."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, fx

from recache_compile.errors import PassError
from recache_compile.passes.base import Pass
from recache_compile.passes.binding_times import binding_times
from recache_compile.program import Binding, Granularity


@dataclass(frozen=True, slots=True)
class FindCacheSites(Pass):
    """Number the cache sites of a granularity in `meta["site"]`.

    `output`: the predictions.  `stack`: the values that are made inside the repeated
    blocks, used after them and depend on the latents.

    Args:
        granularity: where the sites are.
        containers: dotted names of the model's module lists; a block is a member of one.
    """

    granularity: Granularity
    containers: tuple[str, ...]
    name: ClassVar[str] = "find-cache-sites"

    def rewrite(self, module: fx.GraphModule) -> bool:
        """See the class."""
        graph = module.graph
        found = (
            prediction_sites(graph) if self.granularity is Granularity.OUTPUT else stack_sites(graph, self.containers)
        )
        if not found:
            raise PassError(f"no cache site at granularity {self.granularity.value!r}: {_REASONS[self.granularity]}")
        before = {node: node.meta.pop("site") for node in graph.nodes if "site" in node.meta}
        after = {node: site for site, node in enumerate(found)}
        for node, site in after.items():
            node.meta["site"] = site
        return before != after


_REASONS = {
    Granularity.STACK: (
        "no repeated block makes a value that depends on the latents and is used after it; use granularity 'output'"
    ),
    Granularity.OUTPUT: "no result depends on the latents; check the roles of the inputs",
}


def prediction_sites(graph: fx.Graph) -> list[fx.Node]:
    """The results that depend on the latents."""
    times = binding_times(graph)
    results = dict.fromkeys(graph.output_node().all_input_nodes)
    return [node for node in results if Binding.LATENTS in times[node]]


def stack_sites(graph: fx.Graph, containers: tuple[str, ...]) -> list[fx.Node]:
    """Latents-dependent values made inside the repeated blocks and read outside of them."""
    times = binding_times(graph)
    return [
        node
        for node in graph.nodes
        if Binding.LATENTS in times[node]
        and isinstance(node.meta.get("val"), Tensor)
        and block_of(node, containers) is not None
        and any(block_of(user, containers) is None for user in node.users)
    ]


def block_of(node: fx.Node, containers: tuple[str, ...]) -> str | None:
    """Name of the outermost repeated block that made the node ("transformer_blocks.3"), else None."""
    for path, _ in node.meta.get("nn_module_stack", {}).values():
        parent, _, index = path.rpartition(".")
        if index.isdigit() and parent in containers:
            return str(path)
    return None
