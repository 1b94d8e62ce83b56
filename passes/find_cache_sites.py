"""Decide which values of the graph are cached."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor, fx

from recache_compile.errors import PassError
from recache_compile.ir.meta import block_of, origin_of, result_of
from recache_compile.ir.program import Binding, Granularity
from recache_compile.passes.binding_times import binding_times
from recache_compile.passes.ops import MATMULS, packet
from recache_compile.passes.residual_paths import residual_base


@dataclass(frozen=True, slots=True)
class CacheSite:
    """One cached value, as origins of nodes (`ir/meta.py`), which hold in every copy of the graph.

    Args:
        node: makes the value.
        base: makes what the feature is a difference to; None: the feature is the value itself.
    """

    node: int
    base: int | None = None


def find_cache_sites(
    graph: fx.Graph, granularity: Granularity, containers: tuple[str, ...], residual: bool | None = None
) -> tuple[CacheSite, ...]:
    """The cache sites of a captured graph, in graph order.

    `output`: the predictions.  `stack`: what the head reads of the repeated blocks.
    `block`: what every block hands on.  `module`: the last matrix product of every branch
    of a block (attention and MLP outputs before their gates).

    With residuals, a site's base is the input of the same stream to the block or to the stack
    (Delta-DiT, arXiv 2406.01125; TeaCache, arXiv 2411.19108).  A site whose stream is not carried
    on by additions has none.

    Args:
        graph: of a captured program; it stays as it is.
        granularity: where the sites are.
        containers: dotted names of the model's module lists; a block is a member of one.
        residual: cache differences.  None: at `block` only, where absolute features would
            make every block but the last one useless.

    Raises:
        PassError: there is no such site, or no residual; the message says what to do.
    """
    found = _FINDERS[granularity](graph, containers)
    if not found:
        raise PassError(
            f"find-cache-sites: no cache site at granularity {granularity.value!r}: {_REASONS[granularity]}"
        )
    bases = _bases(graph, found, granularity, containers, residual)
    return tuple(CacheSite(_origin(node), _origin(bases[node]) if node in bases else None) for node in found)


def _origin(node: fx.Node) -> int:
    origin = origin_of(node)
    if origin is None:
        raise PassError(f"find-cache-sites: node {node.name} is of no captured program")
    return origin


def _bases(
    graph: fx.Graph,
    sites: Sequence[fx.Node],
    granularity: Granularity,
    containers: tuple[str, ...],
    residual: bool | None,
) -> dict[fx.Node, fx.Node]:
    """The base of every site that has one."""
    wanted = granularity is Granularity.BLOCK if residual is None else residual
    if not wanted:
        return {}
    if granularity not in (Granularity.STACK, Granularity.BLOCK):
        raise PassError(
            f"residual caching needs granularity 'stack' or 'block', not {granularity.value!r}: only there a"
            " stream goes in and comes out"
        )
    after = _after_blocks(graph, containers)
    bases = {}
    for node in sites:
        block = block_of(node, containers)
        inside: Callable[[fx.Node], bool] = (
            (lambda other, block=block: block_of(other, containers) == block)  # type: ignore[misc]
            if granularity is Granularity.BLOCK
            else after.__contains__
        )
        base = residual_base(node, inside)
        if base is not None:
            bases[node] = base
    if not bases and residual:
        raise PassError("no residual to cache: no stream is carried from a block's input to its output by additions")
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
    return Binding.LATENTS in times[node] and isinstance(result_of(node), Tensor)
