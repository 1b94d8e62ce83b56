"""Put a `recache.cache_point` behind every cache site."""

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from recache_compile.passes.base import Pass, call
from recache_compile.passes.ops import CACHE_POINT


@dataclass(frozen=True, slots=True)
class InsertCachePoints(Pass):
    """Make the graph read each site through `recache.cache_point(value, site, base)`.

    A base that is a site itself is read through its own cache point: on a step that
    forecasts both, nothing before them is left.
    """

    name: ClassVar[str] = "insert-cache-points"
    requires: ClassVar[tuple[str, ...]] = ("find-cache-sites",)

    def rewrite(self, module: fx.GraphModule) -> bool:
        """See the class."""
        sites = [node for node in module.graph.nodes if "site" in node.meta and not _has_point(node)]
        named = {node.name: node for node in module.graph.nodes}
        for node in sites:
            base = [named[node.meta["base"]]] if "base" in node.meta else []
            with module.graph.inserting_after(node):
                point = named[node.name] = call(module.graph, CACHE_POINT, node, node.meta["site"], *base)
            node.replace_all_uses_with(point, delete_user_cb=lambda user, point=point: user is not point)
        return bool(sites)


def _has_point(node: fx.Node) -> bool:
    return any(user.target is CACHE_POINT for user in node.users)
