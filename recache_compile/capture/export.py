"""The one door to `torch.export`: a module in, a flat graph module out."""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.graph import CodeGen
from torch.utils import _pytree as pytree

from recache_compile.capture.compat import (
    TraceableWrites,
    base_of,
    detect_fake_mode,
    is_mapped,
    leaving_nothing,
    writes,
)
from recache_compile.capture.higher_order import inline_regions
from recache_compile.errors import CaptureError
from recache_compile.ir.meta import result_of, set_result
from recache_compile.ir.program import get_attribute

aten = torch.ops.aten

_FILLS = {
    **dict.fromkeys((aten.zeros_like, aten.new_zeros), 0),
    **dict.fromkeys((aten.ones_like, aten.new_ones), 1),
    **dict.fromkeys((aten.full_like, aten.new_full)),
}
"""Calls that fill a tensor, and with what; None: with their last argument."""

_RESHAPES = {
    aten.view_as: aten.reshape.default,
    aten.reshape_as: aten.reshape.default,
    aten.expand_as: aten.expand.default,
}


def export_module(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    dynamic_shapes: Any = None,
    decompose: bool = False,
) -> torch.export.ExportedProgram:
    """`torch.export` in non-strict mode, without gradients and without its log lines.

    A graph that writes to tensors is made functional, so that passes may move and merge calls;
    a mapped function becomes what it does: both by decomposing composite operators, which
    `decompose` asks for in any case.  Views among the arguments are copied: export would
    guard on the tensor that they lie in.
    """
    args, kwargs = pytree.tree_map_only(Tensor, _owned, (args, dict(kwargs)))
    silence = contextlib.redirect_stderr(io.StringIO())  # a failure prints the whole graph
    with torch.no_grad(), warnings.catch_warnings(), silence, quiet("torch.export", "torch.fx", "torch._export"):
        warnings.simplefilter("ignore")
        tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        with leaving_nothing(tensors), TraceableWrites():
            exported = torch.export.export(module, args, kwargs, dynamic_shapes=dynamic_shapes, strict=False)
            if decompose or not all(map(_is_plain, _all_nodes(exported.graph_module))):
                exported = exported.run_decompositions({})
        return exported


def _owned(tensor: Tensor) -> Tensor:
    return tensor if base_of(tensor) is None else tensor.detach().clone(memory_format=torch.contiguous_format)


def _all_nodes(module: fx.GraphModule) -> Iterator[fx.Node]:
    """The nodes of a graph and of the graphs that it calls."""
    for child in module.modules():
        if isinstance(child, fx.GraphModule):
            yield from child.graph.nodes


def _is_plain(node: fx.Node) -> bool:
    """Whether a node neither writes to a tensor nor belongs to `torch.vmap`."""
    return not writes(node) and not is_mapped(node)


def flatten(
    exported: torch.export.ExportedProgram, names: Mapping[int, str], prefix: str, device: torch.device | None = None
) -> fx.GraphModule:
    """A graph module that takes and returns flat tensors, and shares the program's weights.

    The weights are detached: they keep their memory when the module is cast or moved later.
    Those that are not dense are copied.
    Regions are inlined.  Views become reshapes: passes may then change the strides of any
    value.  What reads the shape and type of a value alone does not read the value.

    Args:
        exported: what `export_module` made.
        names: name of a weight by the `id` of its tensor, so that a tied weight has one name.
        prefix: other tensors, constants of the code, are named after it and numbered; equal ones are one.
        device: where the whole program runs, see `on_one_device`; None: where the code says.

    Raises:
        CaptureError: the graph calls graphs for another reason.
    """
    module = exported.module()
    assert isinstance(module, fx.GraphModule)
    inline_regions(module)
    graph = module.graph  # a copy already, which nobody else has
    if device is not None:
        on_one_device(graph, device)
    graph.set_codegen(CodeGen())
    for node in graph.nodes:
        write_out_shapes(node)
    known = dict(names)
    weights: dict[str, Tensor] = {}
    for node in list(graph.nodes):
        if node.op == "call_module":  # the guards on the inputs, which have no result
            graph.erase_node(node)
        elif node.op == "get_attr":
            weight = get_attribute(module, str(node.target))
            if not isinstance(weight, Tensor):
                called = ", ".join(sorted({str(user.target) for user in node.users}))
                raise CaptureError(f"the graph calls the higher-order operator {called}, which programs cannot")
            if id(weight) not in known:
                constants = {name: other for name, other in weights.items() if name.startswith(prefix)}
                known[id(weight)] = _equal(weight, constants) or f"{prefix}_{len(known)}"
            node.target = known[id(weight)]
            if node.target not in weights:
                here = weight.detach() if device is None else weight.detach().to(device)
                weights[node.target] = here.contiguous()  # engines read dense memory
    first = next(node for node in graph.nodes if node.op != "placeholder")
    for node in graph.find_nodes(op="placeholder"):
        first.prepend(node)
    output = graph.output_node()
    output.args = (list(output.args[0]),)  # type: ignore[arg-type]
    return fx.GraphModule(weights, graph)


def on_one_device(graph: fx.Graph, device: torch.device) -> None:
    """Let all calls compute on one device: tables that a model's code makes on the host are moved to it.

    Engines are bound to one device, and a copy from the host cannot be part of a CUDA graph.

    Args:
        graph: of an exported module; what is traced is set anew where it was elsewhere.
        device: of the model.
    """

    def moved(leaf: Any) -> Any:
        if isinstance(leaf, torch.device):
            return device
        if isinstance(leaf, Tensor) and leaf.device != device:
            fake_mode = detect_fake_mode(leaf)
            with fake_mode or contextlib.nullcontext():
                return leaf.to(device)
        return leaf

    for node in graph.nodes:
        node.args, node.kwargs = pytree.tree_map_only(torch.device, moved, (node.args, node.kwargs))
        if (value := result_of(node)) is not None:
            set_result(node, pytree.tree_map(moved, value))


def write_out_shapes(node: fx.Node) -> None:
    """Replace a call that reads only the shape or type of an argument by one that has them as numbers."""
    value, kind = node.meta.get("val"), getattr(node.target, "overloadpacket", None)
    first: Any = node.args[0] if node.args else None
    if node.target is aten.view.default:
        node.target = aten.reshape.default
    elif not isinstance(value, Tensor) or not all(isinstance(size, int) for size in value.shape):
        return
    elif kind in _FILLS:
        fill = node.args[-1] if _FILLS[kind] is None else _FILLS[kind]
        node.target, node.args = aten.full.default, (list(value.shape), fill)
        node.kwargs = {"dtype": value.dtype, "device": value.device}
    elif kind in _RESHAPES:
        node.target, node.args = _RESHAPES[kind], (first, list(value.shape))
    elif kind is aten.type_as and first.meta["val"].device == value.device:
        node.target, node.args = aten.to.dtype, (first, value.dtype)


def _equal(tensor: Tensor, others: Mapping[str, Tensor]) -> str | None:
    """Name of a tensor with the same type, place and values."""
    for name, other in others.items():
        if (other.dtype, other.device) == (tensor.dtype, tensor.device) and not tensor.is_meta and other.equal(tensor):
            return name
    return None


@contextlib.contextmanager
def quiet(*names: str) -> Iterator[None]:
    """Raise the level of some loggers for a while."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
