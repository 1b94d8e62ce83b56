"""Map a graph over the rows of a table, with a number of rows that is free at run time.

`torch.vmap` does the mapping.  Its rules for a few operators fix the number of rows while
they are traced, or take products apart; those operators get a rule of ours that does not.
A rule gets the position of the rows in each argument (None: the argument has none) and puts
them first in its result.
"""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional

from recache_compile.capture.compat import arguments_of, is_operator
from recache_compile.errors import PassError
from recache_compile.ir.meta import tensor_of
from recache_compile.ir.program import MIN_ROWS
from recache_compile.ir.sizes import terms_of
from recache_compile.ir.value import Value
from recache_compile.passes.ops import aten


@torch.library.custom_op("recache::cat", mutates_args=())
def cat(tensors: list[Tensor], dim: int) -> Tensor:
    """`torch.cat`."""
    return torch.cat(tensors, dim)


@cat.register_fake
def _(tensors: list[Tensor], dim: int) -> Tensor:
    return torch.cat(tensors, dim)


@cat.register_vmap
def _(info: Any, in_dims: Any, tensors: list[Tensor], dim: int) -> tuple[Tensor, int]:
    moved = _rows_first(tensors, in_dims[0])
    return torch.cat(moved, dim + 1 if dim >= 0 else dim), 0


@torch.library.custom_op("recache::linear", mutates_args=())
def linear(value: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`torch.nn.functional.linear`."""
    return functional.linear(value, weight, bias)


@linear.register_fake
def _(value: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return value.new_empty(*value.shape[:-1], weight.shape[0])


@linear.register_vmap
def _(info: Any, in_dims: Any, value: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, int]:
    if in_dims[1:] == (None, None):
        return functional.linear(value.movedim(in_dims[0], 0), weight, bias), 0
    value, weight = _rows_first([value, weight], in_dims[:2])
    result = value @ _affine(weight.transpose(1, 2), 0, value.dim() - 3)
    return (result if bias is None else result + _affine(bias, in_dims[2], result.dim() - 2)), 0


@torch.library.custom_op("recache::layer_norm", mutates_args=())
def layer_norm(value: Tensor, shape: list[int], weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """`torch.nn.functional.layer_norm`."""
    return functional.layer_norm(value, shape, weight, bias, eps)


@layer_norm.register_fake
def _(value: Tensor, shape: list[int], weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    return torch.empty_like(value)


@layer_norm.register_vmap
def _(
    info: Any, in_dims: Any, value: Tensor, shape: list[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, int]:
    value = value[None] if in_dims[0] is None else value.movedim(in_dims[0], 0)
    if in_dims[2] is None and in_dims[3] is None:
        return functional.layer_norm(value, shape, weight, bias, eps), 0
    result = functional.layer_norm(value, shape, None, None, eps)
    between = value.dim() - 1 - len(shape)
    if weight is not None:
        result = result * _affine(weight, in_dims[2], between)
    return (result if bias is None else result + _affine(bias, in_dims[3], between)), 0


@torch.library.custom_op("recache::attention", mutates_args=())
def attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float | None, grouped: bool
) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention` without dropout."""
    return functional.scaled_dot_product_attention(
        query, key, value, mask, is_causal=causal, scale=scale, enable_gqa=grouped
    )


@attention.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float | None, grouped: bool
) -> Tensor:
    return query.new_empty(*query.shape[:-1], value.shape[-1])


@attention.register_vmap
def _(
    info: Any,
    in_dims: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float | None,
    grouped: bool,
) -> tuple[Tensor, int]:
    if mask is not None:  # a mask may have fewer dimensions than a query
        inner = query.dim() - (in_dims[0] is not None)
        missing = inner - (mask.dim() - (in_dims[3] is not None))
        mask = mask if in_dims[3] is None else mask.movedim(in_dims[3], 0)
        mask = mask.reshape(
            *mask.shape[: in_dims[3] is not None], *[1] * missing, *mask.shape[in_dims[3] is not None :]
        )
        in_dims = (*in_dims[:3], None if in_dims[3] is None else 0)
    tensors = [query, key, value] if mask is None else [query, key, value, mask]
    query, key, value, *rest = _rows_first(tensors, in_dims[: len(tensors)])
    rows = query.shape[:2] if query.dim() == key.dim() == value.dim() == 5 else None
    if rows is not None:  # kernels take four dimensions
        wide = [query, key, value, *(each.expand(*rows, *each.shape[2:]) for each in rest)]
        query, key, value, *rest = [tensor.flatten(0, 1) for tensor in wide]
    result = functional.scaled_dot_product_attention(
        query, key, value, rest[0] if rest else None, is_causal=causal, scale=scale, enable_gqa=grouped
    )
    return (result if rows is None else result.reshape(*rows, *result.shape[1:])), 0


@torch.library.custom_op("recache::index_select", mutates_args=())
def index_select(value: Tensor, dim: int, index: Tensor) -> Tensor:
    """`torch.index_select`."""
    return value.index_select(dim, index)


@index_select.register_fake
def _(value: Tensor, dim: int, index: Tensor) -> Tensor:
    return value.index_select(dim, index)


@index_select.register_vmap
def _(info: Any, in_dims: Any, value: Tensor, dim: int, index: Tensor) -> tuple[Tensor, int]:
    dim = dim % (value.dim() - (in_dims[0] is not None))
    if in_dims[2] is None:
        return value.movedim(in_dims[0], 0).index_select(dim + 1, index), 0
    index = index.movedim(in_dims[2], 0)
    index = index.reshape(index.shape[0], -1)
    if in_dims[0] is None:
        chosen = value.index_select(dim, index.flatten())
        return chosen.reshape(*value.shape[:dim], *index.shape, *value.shape[dim + 1 :]).movedim(dim, 0), 0
    moved = value.movedim(in_dims[0], 0).movedim(dim + 1, 1)
    rows = torch.arange(moved.shape[0], device=moved.device)[:, None]
    return moved[rows, index].movedim(1, dim + 1), 0


def _convolve(
    value: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    """`torch.convolution` that is not transposed; `value` has a batch."""
    return torch.convolution(value, weight, bias, stride, padding, dilation, False, [0] * len(stride), groups)


convolution = torch.library.custom_op("recache::convolution", _convolve, mutates_args=())
convolution.register_fake(_convolve)


@convolution.register_vmap
def _(info: Any, in_dims: Any, value: Tensor, weight: Tensor, bias: Tensor | None, *sizes: Any) -> tuple[Tensor, int]:
    assert in_dims[1:3] == (None, None), "the kernel is shared by the rows"
    moved = value.movedim(in_dims[0], 0)
    result = _convolve(moved.flatten(0, 1), weight, bias, *sizes)
    return result.reshape(*moved.shape[:2], *result.shape[1:]), 0


@torch.library.custom_op("recache::slice_scatter", mutates_args=())
def slice_scatter(value: Tensor, source: Tensor, dim: int, start: int, end: int, step: int) -> Tensor:
    """`torch.slice_scatter`."""
    return torch.slice_scatter(value, source, dim, start, end, step)


@slice_scatter.register_fake
def _(value: Tensor, source: Tensor, dim: int, start: int, end: int, step: int) -> Tensor:
    return torch.empty_like(value)


@slice_scatter.register_vmap
def _(
    info: Any, in_dims: Any, value: Tensor, source: Tensor, dim: int, start: int, end: int, step: int
) -> tuple[Tensor, int]:
    value, source = _rows_first([value, source], in_dims[:2])
    return torch.slice_scatter(value, source, dim + 1, start, end, step), 0


def zeros(values: Sequence[Value], nodes: Sequence[fx.Node]) -> tuple[Tensor, ...]:
    """Inputs to trace with, where the nodes' values are: a free number of rows is no number that export would fix."""
    return tuple(
        torch.zeros(
            [MIN_ROWS + 1 if size is None else size for size in value.shape],
            dtype=value.dtype,
            device=tensor_of(node).device,
        )
        for value, node in zip(values, nodes, strict=True)
    )


def free_dimensions(value: Value) -> dict[int, Any]:
    """For `torch.export`: a number of rows must stay free; of other free sizes `check_free` tells."""
    rows = {at: torch.export.Dim.DYNAMIC for at, size in enumerate(value.shape) if size is None}
    return rows | {at: torch.export.Dim.AUTO for at, term in enumerate(value.free) if term}


def check_free(node: fx.Node, value: Value) -> None:
    """Raise `PassError` where an input of what was exported has a number in the place of a free size."""
    if fixed := value.fixed_in(tensor_of(node)):
        raise PassError(f"{value.name}: its size {fixed[0]} cannot stay free")


def use_free_row_rules(graph: fx.Graph) -> None:
    """Let the operators whose own rule is not good enough use ours."""
    ours = torch.ops.recache
    for node in list(graph.nodes):
        if not is_operator(node):
            continue
        given = arguments_of(node)
        if node.target in (aten.cat.default, aten.concat.default, aten.concatenate.default):
            _retarget(node, ours.cat.default, given["tensors"], given["dim"])
        elif node.target is aten.index_select.default:
            _retarget(node, ours.index_select.default, given["self"], given["dim"], given["index"])
        elif node.target is aten.copy.default and _writes_all(node):
            node.replace_all_uses_with(node.args[1])  # type: ignore[arg-type]
            graph.erase_node(node)
        elif node.target is aten.slice_scatter.default:
            value, dim = given["self"], given["dim"] % tensor_of(given["self"]).dim()
            end = min(given["end"] or sys.maxsize, tensor_of(value).shape[dim])
            start, step = given["start"] or 0, given["step"]
            _retarget(node, ours.slice_scatter.default, value, given["src"], dim, start, end, step)
        elif node.target in _CONVOLUTIONS:
            _use_convolution(node, given)
        elif node.target is aten.linear.default:
            _retarget(node, ours.linear.default, given["input"], given["weight"], given["bias"])
        elif node.target is aten.layer_norm.default:
            kept = ("input", "normalized_shape", "weight", "bias", "eps")
            _retarget(node, ours.layer_norm.default, *map(given.get, kept))
        elif node.target is aten.scaled_dot_product_attention.default and not given["dropout_p"]:
            names = ("query", "key", "value", "attn_mask", "is_causal", "scale", "enable_gqa")
            _retarget(node, ours.attention.default, *map(given.get, names))


def _writes_all(node: fx.Node) -> bool:
    """Whether a copy has the type of what is copied."""
    source, made = tensor_of(node.args[1]), tensor_of(node)  # type: ignore[arg-type]
    return terms_of(source.shape) == terms_of(made.shape) and source.dtype == made.dtype


_CONVOLUTIONS = (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)


def _use_convolution(node: fx.Node, given: Mapping[str, Any]) -> None:
    """Ours in the place of a convolution whose input has a batch and whose kernel is a weight."""
    spatial = tensor_of(given["weight"]).dim() - 2
    if tensor_of(given["input"]).dim() != spatial + 2:
        return
    sizes = [
        list(given[name]) * (spatial if len(given[name]) == 1 else 1) for name in ("stride", "padding", "dilation")
    ]
    _retarget(
        node,
        torch.ops.recache.convolution.default,
        *map(given.get, ("input", "weight", "bias")),
        *sizes,
        given["groups"],
    )


def _retarget(node: fx.Node, target: Any, *args: Any) -> None:
    node.target, node.args, node.kwargs = target, args, {}


def _rows_first(tensors: list[Tensor], dims: Any) -> list[Tensor]:
    """Every tensor with the rows as its first dimension, expanded where it has none."""
    rows = next(tensor.shape[at] for tensor, at in zip(tensors, dims, strict=True) if at is not None)
    return [
        tensor.expand(rows, *tensor.shape) if at is None else tensor.movedim(at, 0)
        for tensor, at in zip(tensors, dims, strict=True)
    ]


def _affine(weight: Tensor, at: int | None, between: int) -> Tensor:
    """A scale or shift, with room for `between` dimensions after its rows."""
    if at is None:
        return weight
    moved = weight.movedim(at, 0)
    return moved.reshape(moved.shape[0], *[1] * between, *moved.shape[1:])
