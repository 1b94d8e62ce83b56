"""The one door to `torch.export`: a module in, a flat graph module out."""

import contextlib
import copy
import logging
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.graph import CodeGen

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
        return exported.run_decompositions({}) if any(map(writes, exported.graph.nodes)) else exported


def writes(node: fx.Node) -> bool:
    """Whether a call writes to one of its arguments."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


def flatten(exported: torch.export.ExportedProgram, names: Mapping[int, str], prefix: str) -> fx.GraphModule:
    """A graph module that takes and returns flat tensors, and shares the program's weights.

    The weights are detached: they keep their memory when the module is cast or moved later.

    Args:
        exported: what `export_module` made.
        names: name of a weight by the `id` of its tensor, so that a tied weight has one name.
        prefix: other tensors, constants of the code, are named after it and numbered.
    """
    module = exported.module()
    graph = copy.deepcopy(module.graph)
    graph.set_codegen(CodeGen())
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
