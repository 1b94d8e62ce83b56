"""Put a `recache.cache_point` behind every cache site."""

from dataclasses import dataclass
from typing import ClassVar

from torch import fx
from typing_extensions import override

from recache_compile.errors import PassError
from recache_compile.ir.meta import by_origin
from recache_compile.passes.base import Pass, call
from recache_compile.passes.find_cache_sites import CacheSite
from recache_compile.passes.ops import CACHE_POINT


@dataclass(frozen=True, slots=True)
class InsertCachePoints(Pass):
    """Make the graph read each site through `recache.cache_point(value, number, base)`.

    A base that is a site itself is read through its own cache point: on a step that
    forecasts both, nothing before them is left.

    Args:
        sites: what `find_cache_sites` found in the program.
    """

    sites: tuple[CacheSite, ...]
    name: ClassVar[str] = "insert-cache-points"

    def options(self) -> str:
        """How many sites; which they are is in the graph."""
        return f"sites={len(self.sites)}"

    @override
    def rewrite(self, module: fx.GraphModule) -> bool:
        nodes = by_origin(module.graph)
        wanted = {origin for site in self.sites for origin in (site.node, site.base) if origin is not None}
        if missing := wanted - set(nodes):
            raise PassError(
                f"{len(missing)} values of the cache sites are not in this graph; find them in this program"
            )
        modified = False
        for number, site in enumerate(self.sites):
            node = nodes[site.node]
            if _has_point(node):
                continue
            base = [] if site.base is None else [nodes[site.base]]
            with module.graph.inserting_after(node):
                point = nodes[site.node] = call(module.graph, CACHE_POINT, node, number, *base)
            node.replace_all_uses_with(point, delete_user_cb=point.__ne__)
            modified = True
        return modified


def _has_point(node: fx.Node) -> bool:
    return any(user.target is CACHE_POINT for user in node.users)
