"""Facts on the nodes of a graph: the one place that reads and writes `node.meta` for the package.

`torch` keeps facts of its own there, of which two are read: the value that a node has while it is
traced, and the modules that made it.  All of them survive a copy of the graph.
"""

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from recache_compile.ir.value import Value

_VALUE, _VALUES, _LAYOUT, _KEPT, _ORIGIN, _TYPE = "value", "values", "layout", "kept_in_step", "origin", "type"
_RESULT, _MODULES = "val", "nn_module_stack"
_ORIGINS = itertools.count()


@dataclass(frozen=True, slots=True)
class Entry:
    """One value inside a packed input.

    Args:
        node: origin of the node that makes it in the captured program.
        offset: of its first element.
        shape: its sizes.
    """

    node: int
    offset: int
    shape: tuple[int, ...]


def value_of(placeholder: fx.Node) -> Value:
    """Facts about an input of a program."""
    value: Value = placeholder.meta[_VALUE]
    return value


def is_described(placeholder: fx.Node) -> bool:
    """Whether there are facts about an input."""
    return _VALUE in placeholder.meta


def describe_input(placeholder: fx.Node, value: Value) -> None:
    """Set the facts about an input of a program."""
    placeholder.meta[_VALUE] = value


def values_of(output: fx.Node) -> tuple[Value, ...]:
    """Facts about the results of a program, from its output node."""
    return tuple(output.meta[_VALUES])


def describe_outputs(output: fx.Node, values: Iterable[Value]) -> None:
    """Set the facts about the results of a program on its output node."""
    output.meta[_VALUES] = tuple(values)


def layout_of(placeholder: fx.Node) -> tuple[Entry, ...]:
    """Where a packed input holds which value; empty for other nodes."""
    return tuple(placeholder.meta.get(_LAYOUT, ()))


def set_layout(placeholder: fx.Node, entries: Iterable[Entry]) -> None:
    """Make an input a packed one."""
    placeholder.meta[_LAYOUT] = tuple(entries)


def is_kept_in_step(node: fx.Node) -> bool:
    """Whether a step computes the node itself although it could be hoisted."""
    return _KEPT in node.meta


def keep_in_step(node: fx.Node) -> None:
    """Let every step compute the node itself."""
    node.meta[_KEPT] = True


def number_nodes(graph: fx.Graph) -> None:
    """Give every node an origin that has none yet: a number that only its copies in other graphs have.

    A copy in the same graph gets a number of its own.
    """
    taken: set[int] = set()
    for node in graph.nodes:
        if node.meta.get(_ORIGIN) is None or node.meta[_ORIGIN] in taken:
            node.meta[_ORIGIN] = next(_ORIGINS)
        taken.add(node.meta[_ORIGIN])


def origin_of(node: fx.Node) -> int | None:
    """What a node and its copies in other graphs have in common; None: the node was never numbered."""
    origin: int | None = node.meta.get(_ORIGIN)
    return origin


def by_origin(graph: fx.Graph) -> dict[int, fx.Node]:
    """The numbered nodes of a graph."""
    return {origin: node for node in graph.nodes if (origin := origin_of(node)) is not None}


def tensor_of(node: Any) -> Tensor:
    """The value that a node has while it is traced: a tensor without memory."""
    value: Tensor = node.meta[_RESULT]
    return value


def result_of(node: fx.Node) -> Any:
    """The same for nodes that may have several values, or something that is no tensor; None: it is not known."""
    return node.meta.get(_RESULT)


def set_result(node: fx.Node, value: Any) -> None:
    """Set the value that a node has while it is traced."""
    node.meta[_RESULT] = value


def type_text(node: fx.Node) -> str | None:
    """Type of a node as text, where it was read from a file; None: it has values instead."""
    text: str | None = node.meta.get(_TYPE)
    return text


def set_type_text(node: fx.Node, text: str) -> None:
    """Set the type of a node that was read from a file."""
    node.meta[_TYPE] = text


def module_paths(node: fx.Node) -> tuple[str, ...]:
    """Dotted names of the modules that made a node, from the outermost."""
    return tuple(str(path) for path, _ in node.meta.get(_MODULES, {}).values())


def set_module_path(node: fx.Node, path: str) -> None:
    """Name the module that made a node, of which no more is known than its path."""
    node.meta[_MODULES] = {path: (path, "torch.nn.Module")}


def block_of(node: fx.Node, containers: tuple[str, ...] | None = None) -> str | None:
    """Name of the outermost repeated block that made a node ("transformer_blocks.3"), else None.

    Args:
        node: of a captured graph.
        containers: dotted names of the model's module lists; a block is a member of one.
            None: any module with a number for a name is a block.
    """
    for path in module_paths(node):
        parent, _, index = path.rpartition(".")
        if index.isdigit() and (containers is None or parent in containers):
            return path
    return None
