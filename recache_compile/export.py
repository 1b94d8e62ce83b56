"""The one door to `torch.export`: a module in, a flat graph module out."""

import contextlib
import copy
import logging
import operator
import re
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.graph import CodeGen
from torch.utils import _pytree as pytree

from recache_compile.program import get_attribute


def export_module(
    module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], dynamic_shapes: Any = None
) -> torch.export.ExportedProgram:
    """`torch.export` in non-strict mode, without gradients and without its log lines.

    A graph that writes to tensors is made functional, so that passes may move and merge calls.
    """
    with torch.no_grad(), warnings.catch_warnings(), quiet("torch.export", "torch.fx", "torch._export"):
        warnings.simplefilter("ignore")
        exported = torch.export.export(module, args, dict(kwargs), dynamic_shapes=dynamic_shapes, strict=False)
        return exported.run_decompositions({}) if any(map(writes, _all_nodes(exported.graph_module))) else exported


def _all_nodes(module: fx.GraphModule) -> Iterator[fx.Node]:
    """The nodes of a graph and of the graphs that it calls."""
    for child in module.modules():
        if isinstance(child, fx.GraphModule):
            yield from child.graph.nodes


def writes(node: fx.Node) -> bool:
    """Whether a call writes to one of its arguments."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


def flatten(exported: torch.export.ExportedProgram, names: Mapping[int, str], prefix: str) -> fx.GraphModule:
    """A graph module that takes and returns flat tensors, and shares the program's weights.

    The weights are detached: they keep their memory when the module is cast or moved later.
    Regions are inlined, and views become reshapes: passes may then change the strides of
    any value.

    Args:
        exported: what `export_module` made.
        names: name of a weight by the `id` of its tensor, so that a tied weight has one name.
        prefix: other tensors, constants of the code, are named after it and numbered.
    """
    module = exported.module()
    assert isinstance(module, fx.GraphModule)
    inline_regions(module)
    graph = copy.deepcopy(module.graph)
    graph.set_codegen(CodeGen())
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.view.default):
        node.target = torch.ops.aten.reshape.default
    known = dict(names)
    weights: dict[str, Tensor] = {}
    for node in list(graph.nodes):
        if node.op == "call_module":  # the guards on the inputs, which have no result
            graph.erase_node(node)
        elif node.op == "get_attr":
            weight = get_attribute(module, str(node.target))
            node.target = known.setdefault(id(weight), f"{prefix}_{len(known)}")
            weights.setdefault(node.target, weight.detach())
    first = next(node for node in graph.nodes if node.op != "placeholder")
    for node in graph.find_nodes(op="placeholder"):
        first.prepend(node)
    output = graph.output_node()
    output.args = (list(output.args[0]),)  # type: ignore[arg-type]
    return fx.GraphModule(weights, graph)


def inline_regions(module: fx.GraphModule) -> None:
    """Replace calls of `torch.no_grad` and `torch.autocast` regions by what is in them.

    Raises:
        ValueError: a region casts to half precision, which inlining would lose.
    """
    regions = torch.ops.higher_order
    graph = module.graph
    for node in list(graph.nodes):
        if node.target is regions.wrap_with_set_grad_enabled:
            _, region, *arguments = node.args
        elif node.target is regions.wrap_with_autocast:
            _, dtype, enabled, _, region, *arguments = node.args
            if enabled and dtype not in (None, torch.float32):
                raise ValueError(f"the model runs a part of itself under torch.autocast to {dtype}")
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


def named_leaves(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Leaves of nested arguments by dotted name, in `torch.export`'s order."""
    if not any(isinstance(value, (list, tuple, dict)) for value in arguments.values()):
        return dict(arguments)
    flat, _ = pytree.tree_flatten_with_path(dict(arguments))
    return {dotted_name(path): leaf for path, leaf in flat}


def dotted_name(path: Any) -> str:
    """Name of a leaf ("x.0", "kwargs.scale") from its path."""
    return ".".join(re.sub(r"[\[\]'\"]", "", str(key)).strip(".") for key in path)


@contextlib.contextmanager
def quiet(*names: str) -> Iterator[None]:
    """Raise the level of some loggers for a while."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
