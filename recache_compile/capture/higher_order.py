"""Higher-order calls: regions of a graph are inlined, flexible attention is traced as ordinary attention."""

import contextlib
import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional
from torch.nn.attention import flex_attention

from recache_compile.capture.compat import flex_attention_as
from recache_compile.errors import CaptureError
from recache_compile.ir.program import get_attribute


def inline_regions(module: fx.GraphModule) -> None:
    """Replace calls of `torch.no_grad` and `torch.autocast` regions by what is in them.

    Raises:
        CaptureError: a region casts to half precision, which inlining would lose.
    """
    regions = torch.ops.higher_order
    graph = module.graph
    for node in list(graph.nodes):
        if node.target is regions.wrap_with_set_grad_enabled:
            _, region, *arguments = node.args
        elif node.target is regions.wrap_with_autocast:
            _, dtype, enabled, _, region, *arguments = node.args
            if enabled and dtype not in (None, torch.float32):
                raise CaptureError(f"the model runs a part of itself under torch.autocast to {dtype}")
        else:
            continue
        inner = getattr(module, region.target)
        inline_regions(inner)
        with graph.inserting_before(node):
            results = _copy_into(graph, module, inner, arguments)
        for user in list(node.users):
            assert user.target is operator.getitem
            user.replace_all_uses_with(results[user.args[1]])
            graph.erase_node(user)
        graph.erase_node(node)
        if not region.users:
            graph.erase_node(region)


def _copy_into(graph: fx.Graph, module: fx.GraphModule, inner: fx.GraphModule, arguments: list[fx.Node]) -> Any:
    """Copy the nodes of `inner` to the insertion point; what it returns, as nodes."""
    copies = dict(zip(inner.graph.find_nodes(op="placeholder"), arguments, strict=True))
    for node in inner.graph.nodes:
        if node.op == "get_attr":
            name = f"{module._get_name()}_{node.target}_{id(inner)}"
            setattr(module, name, get_attribute(inner, str(node.target)))
            copies[node] = graph.get_attr(name)
            copies[node].meta = dict(node.meta)
        elif node.op not in ("placeholder", "output"):
            copies[node] = graph.node_copy(node, copies.__getitem__)
    return fx.node.map_arg(inner.graph.output_node().args[0], copies.__getitem__)


@contextlib.contextmanager
def ordinary_attention() -> Iterator[None]:
    """While a model is traced: `flex_attention` is attention with a mask of all pairs of tokens.

    It is what `flex_attention` computes where it is not compiled: its mask function decides,
    and block masks are hints for kernels that skip blocks.
    """
    with flex_attention_as(_attend):
        yield


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_mod: Any = None,
    block_mask: flex_attention.BlockMask | None = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    **options: Any,
) -> Tensor:
    wanted = [name for name in ("return_lse", "return_aux") if options.get(name)]
    if score_mod is not None or wanted:
        raise CaptureError("flex_attention with a score_mod or more results than one is not ordinary attention")
    mask = None
    if block_mask is not None and block_mask.mask_mod is not flex_attention.noop_mask:
        batch, heads = block_mask.shape[:2]
        mask = flex_attention.create_mask(block_mask.mask_mod, batch, heads, query.shape[2], key.shape[2], query.device)
    return functional.scaled_dot_product_attention(query, key, value, mask, scale=scale, enable_gqa=enable_gqa)
