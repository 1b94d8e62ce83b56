"""Decide which values of the graph are cached."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, fx

from recache_compile.errors import PassError
from recache_compile.ir.program import Binding, Granularity
from recache_compile.passes.base import Pass
from recache_compile.passes.binding_times import binding_times
from recache_compile.passes.ops import MATMULS, packet
from recache_compile.passes.residual_paths import residual_base


@dataclass(frozen=True, slots=True)
class FindCacheSites(Pass):
    """Number the cache sites of a granularity in `meta["site"]`.

    `output`: the predictions.  `stack`: what the head reads of the repeated blocks.
    `block`: what every block hands on.  `module`: the last matrix product of every branch
    of a block (attention and MLP outputs before their gates).

    With residuals, `meta["base"]` names the value that a site's feature is a difference to:
    the input of the same stream to the block or to the stack (Delta-DiT, arXiv 2406.01125;
    TeaCache, arXiv 2411.19108).  A site whose stream is not carried on by additions has none.

    Args:
        granularity: where the sites are.
        containers: dotted names of the model's module lists; a block is a member of one.
        residual: cache differences.  None: at `block` only, where absolute features would
            make every block but the last one useless.
    """

    granularity: Granularity
    containers: tuple[str, ...]
    residual: bool | None = None
    name: ClassVar[str] = "find-cache-sites"

    def rewrite(self, module: fx.GraphModule) -> bool:
        """See the class."""
        graph = module.graph
        find = _FINDERS[self.granularity]
        found = find(graph, self.containers)
        if not found:
            raise PassError(f"no cache site at granularity {self.granularity.value!r}: {_REASONS[self.granularity]}")
        bases = self._bases(graph, found)
        before = {
            node: (node.meta.pop("site"), node.meta.pop("base", None)) for node in graph.nodes if "site" in node.meta
        }
        after = {node: (site, bases.get(node)) for site, node in enumerate(found)}
        for node, (site, base) in after.items():
            node.meta["site"] = site
            if base is not None:
                node.meta["base"] = base
        return before != after

    def _bases(self, graph: fx.Graph, sites: list[fx.Node]) -> dict[fx.Node, str]:
        """Name of the base of every site that has one."""
        wanted = self.granularity is Granularity.BLOCK if self.residual is None else self.residual
        if not wanted:
            return {}
        if self.granularity not in (Granularity.STACK, Granularity.BLOCK):
            raise PassError(
                f"residual caching needs granularity 'stack' or 'block', not {self.granularity.value!r}: only there a"
                " stream goes in and comes out"
            )
        after = _after_blocks(graph, self.containers)
        bases = {}
        for node in sites:
            block = block_of(node, self.containers)
            inside: Callable[[fx.Node], bool] = (
                (lambda other, block=block: block_of(other, self.containers) == block)  # type: ignore[misc]
                if self.granularity is Granularity.BLOCK
                else after.__contains__
            )
            base = residual_base(node, inside)
            if base is not None:
                bases[node] = base.name
        if not bases and self.residual:
            raise PassError(
                "no residual to cache: no stream is carried from a block's input to its output by additions"
            )
        return bases


_REASONS = {
    Granularity.OUTPUT: "no result depends on the latents; check the roles of the inputs",
    Granularity.STACK: (
        "no repeated block makes a value that depends on the latents and is used after it; use granularity 'output'"
    ),
    Granularity.BLOCK: "no repeated block makes a value that depends on the latents; use granularity 'output'",
    Granularity.MODULE: "no repeated block multiplies matrices that depend on the latents; use granularity 'output'",
}


def prediction_sites(graph: fx.Graph, containers: tuple[str, ...] = ()) -> list[fx.Node]:
    """The results that depend on the latents."""
    times = binding_times(graph)
    results = dict.fromkeys(graph.output_node().all_input_nodes)
    return [node for node in results if Binding.LATENTS in times[node]]


def stack_sites(graph: fx.Graph, containers: tuple[str, ...]) -> list[fx.Node]:
    """The block-made values that the results are computed from without any further block."""
    return _first_met(graph, lambda node: block_of(node, containers) is not None)


def block_sites(graph: fx.Graph, containers: tuple[str, ...]) -> list[fx.Node]:
    """Latents-dependent values made inside a block and read outside of that block."""
    times = binding_times(graph)
    blocks = {node: block_of(node, containers) for node in graph.nodes}
    return [
        node
        for node in graph.nodes
        if blocks[node] is not None
        and _is_latents_tensor(node, times)
        and any(blocks[user] != blocks[node] for user in node.users)
    ]


def module_sites(graph: fx.Graph, containers: tuple[str, ...]) -> list[fx.Node]:
    """The matrix products inside blocks that reach the results without passing through another one."""
    return _first_met(graph, lambda node: packet(node) in MATMULS and block_of(node, containers) is not None)


_FINDERS = {
    Granularity.OUTPUT: prediction_sites,
    Granularity.STACK: stack_sites,
    Granularity.BLOCK: block_sites,
    Granularity.MODULE: module_sites,
}


def block_of(node: fx.Node, containers: tuple[str, ...]) -> str | None:
    """Name of the outermost repeated block that made the node ("transformer_blocks.3"), else None."""
    for path, _ in node.meta.get("nn_module_stack", {}).values():
        parent, _, index = path.rpartition(".")
        if index.isdigit() and parent in containers:
            return str(path)
    return None


def _first_met(graph: fx.Graph, stop: Callable[[fx.Node], bool]) -> list[fx.Node]:
    """Walk from the results towards the latents; the nodes where it stops, in graph order."""
    times = binding_times(graph)
    met: set[fx.Node] = set()
    visited: set[fx.Node] = set()
    pending = list(graph.output_node().all_input_nodes)
    while pending:
        node = pending.pop()
        if node in visited or Binding.LATENTS not in times[node]:
            continue
        visited.add(node)
        if stop(node) and _is_latents_tensor(node, times):
            met.add(node)
        else:
            pending.extend(node.all_input_nodes)
    return [node for node in graph.nodes if node in met]


def _after_blocks(graph: fx.Graph, containers: tuple[str, ...]) -> set[fx.Node]:
    """Nodes made in a block from the latents, and all that is computed from them."""
    times = binding_times(graph)
    after: set[fx.Node] = set()
    for node in graph.nodes:
        inside = block_of(node, containers) is not None and Binding.LATENTS in times[node]
        if inside or any(source in after for source in node.all_input_nodes):
            after.add(node)
    return after


def _is_latents_tensor(node: fx.Node, times: dict[fx.Node, Binding]) -> bool:
    return Binding.LATENTS in times[node] and isinstance(node.meta.get("val"), Tensor)
