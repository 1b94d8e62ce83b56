"""Map a graph over the rows of a table, with a number of rows that is free at run time.

`torch.vmap` does the mapping.  Its rules for a few operators fix the number of rows while
they are traced; those operators get a rule of ours that does not.
"""

import torch
from torch import Tensor, fx
from torch.nn import functional

from recache_compile.passes.ops import aten


@torch.library.custom_op("recache::cat", mutates_args=())
def cat(tensors: list[Tensor], dim: int) -> Tensor:
    """`torch.cat`."""
    return torch.cat(tensors, dim)


@cat.register_fake
def _(tensors: list[Tensor], dim: int) -> Tensor:
    return torch.cat(tensors, dim)


@cat.register_vmap
def _(info, in_dims, tensors, dim):  # type: ignore[no-untyped-def]
    dims = in_dims[0]
    rows = next(tensor.shape[at] for tensor, at in zip(tensors, dims, strict=True) if at is not None)
    moved = [
        tensor.expand(rows, *tensor.shape) if at is None else tensor.movedim(at, 0)
        for tensor, at in zip(tensors, dims, strict=True)
    ]
    return torch.cat(moved, dim + 1 if dim >= 0 else dim), 0


@torch.library.custom_op("recache::layer_norm", mutates_args=())
def layer_norm(value: Tensor, shape: list[int], weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """`torch.nn.functional.layer_norm`."""
    return functional.layer_norm(value, shape, weight, bias, eps)


@layer_norm.register_fake
def _(value: Tensor, shape: list[int], weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    return torch.empty_like(value)


@layer_norm.register_vmap
def _(info, in_dims, value, shape, weight, bias, eps):  # type: ignore[no-untyped-def]
    return functional.layer_norm(value.movedim(in_dims[0], 0), shape, weight, bias, eps), 0


def use_free_row_rules(graph: fx.Graph) -> None:
    """Let the operators whose own rule fixes the number of rows use ours."""
    for node in graph.nodes:
        if node.target is aten.cat.default:
            tensors, dim = (*node.args, 0)[:2]
            node.args, node.target = (tensors, dim), torch.ops.recache.cat.default
        elif node.target is aten.layer_norm.default:
            value, shape, weight, bias, eps = (*node.args, *(None, None, 1e-5)[len(node.args) - 2 :])[:5]
            node.args, node.target = (value, shape, weight, bias, eps), torch.ops.recache.layer_norm.default
