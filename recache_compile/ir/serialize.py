"""Programs as JSON: readable, portable, and nothing to unpickle.

Only calls into ATen, `operator` and the like are read back, so that a program file cannot
name any other function.
"""

import json
import math
import operator
from typing import Any

import torch
from torch import Tensor, fx

from recache_compile.errors import ArtifactError
from recache_compile.ir.meta import (
    describe_input,
    describe_outputs,
    module_paths,
    result_of,
    set_module_path,
    set_type_text,
    type_text,
    value_of,
)
from recache_compile.ir.program import PassRecord, Program
from recache_compile.ir.value import Kind, Value

_OPERATORS = ("getitem", "add", "sub", "mul", "floordiv", "truediv", "mod", "neg", "eq", "ne", "le", "lt", "ge", "gt")
_OF_TORCH = {"sym_max": torch.sym_max, "sym_min": torch.sym_min}
_TORCH_TYPES = {"dtype": torch.dtype, "layout": torch.layout, "memory_format": torch.memory_format}


def program_to_json(program: Program) -> str:
    """The text of a program: facts about inputs and outputs, then one line a node."""
    nodes = [_node(node) for node in program.module.graph.nodes if node.op not in ("placeholder", "output")]
    results = [_encode(result) for result in program.module.graph.output_node().args[0]]  # type: ignore[union-attr]
    inputs = [
        {"node": node.name, **value_to_json(value_of(node))}
        for node in program.module.graph.find_nodes(op="placeholder")
    ]
    lines = ",\n".join("  " + json.dumps(node) for node in nodes)
    head: dict[str, Any] = {
        "name": program.name,
        "provenance": [[record.name, record.options] for record in program.provenance],
        "inputs": inputs,
    }
    head |= {"ranges": {symbol: list(bounds) for symbol, bounds in program.ranges.items()}} if program.ranges else {}
    tail = {"results": results, "outputs": [value_to_json(value) for value in program.outputs]}
    return f'{json.dumps(head)[:-1]},\n "nodes": [\n{lines}\n ],\n {json.dumps(tail)[1:]}\n'


def weights_named(text: str) -> set[str]:
    """Names of the weights that a program's text reads.

    Raises:
        ArtifactError: the text is no program.
    """
    try:
        return {entry["weight"] for entry in json.loads(text)["nodes"] if "weight" in entry}
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"not a program: {type(error).__name__}: {error}") from error


def program_from_json(text: str, weights: dict[str, Tensor], device: torch.device) -> Program:
    """Read `program_to_json`'s text; the graph reads `weights` by name and makes its tensors on a device.

    Raises:
        ArtifactError: the text is no program, names a function that is not allowed, or
            reads a weight that is not there.
    """
    try:
        data = json.loads(text)
        return _program(data, weights, device)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"not a program: {type(error).__name__}: {error}") from error


def _program(data: dict[str, Any], weights: dict[str, Tensor], device: torch.device) -> Program:
    graph = fx.Graph()
    nodes: dict[str, fx.Node] = {}
    for entry in data["inputs"]:
        node = nodes[entry["node"]] = graph.placeholder(entry["node"])
        describe_input(node, read_value(entry))
    used: dict[str, Tensor] = {}
    for entry in data["nodes"]:
        if "weight" in entry:
            weight = used[entry["weight"]] = weights[entry["weight"]]
            if describe(weight) != entry["type"]:
                raise ArtifactError(
                    f"weight {entry['weight']} is {describe(weight)}, the program expects {entry['type']}"
                )
            node = graph.create_node("get_attr", entry["weight"], name=entry["node"])
        else:
            args = _decode(entry["args"], nodes, device)
            kwargs = {key: _decode(item, nodes, device) for key, item in entry["kwargs"].items()}
            node = graph.create_node("call_function", _target(entry["call"]), tuple(args), kwargs, name=entry["node"])
        set_type_text(node, entry["type"])
        if "module" in entry:
            set_module_path(node, str(entry["module"]))
        nodes[entry["node"]] = node
    output = graph.output([_decode(result, nodes, device) for result in data["results"]])
    describe_outputs(output, map(read_value, data["outputs"]))
    return Program(
        data["name"],
        fx.GraphModule(used, graph),
        tuple(PassRecord(name, options) for name, options in data["provenance"]),
        {str(symbol): (int(least), int(most)) for symbol, (least, most) in data.get("ranges", {}).items()},
    )


def _node(node: fx.Node) -> dict[str, Any]:
    paths = module_paths(node)
    described = {"node": node.name, "type": type_of(node)}
    described |= {"module": paths[-1]} if paths and paths[-1] else {}
    if node.op == "get_attr":
        return {"weight": str(node.target), **described}
    target = node.target
    place = "torch" if target in _OF_TORCH.values() else "operator"
    call = target.name() if isinstance(target, torch._ops.OpOverload) else f"{place}::{getattr(target, '__name__', '')}"
    _target(call)
    return {"call": call, **described, "args": _encode(node.args), "kwargs": _encode(node.kwargs)}


def type_of(node: fx.Node) -> str:
    """A node's type for people."""
    return type_text(node) or describe(result_of(node))


def describe(value: Any) -> str:
    """A value's type for people, as "float32[1, 64, 128]"."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}[{', '.join(map(str, value.shape))}]"
    if isinstance(value, (list, tuple)):
        return "(" + ", ".join(describe(item) for item in value) + ")"
    return type(value).__name__


def _target(name: str) -> Any:
    namespace, _, rest = name.partition("::")
    if namespace == "operator" and rest in _OPERATORS:
        return getattr(operator, rest)
    if namespace == "torch" and rest in _OF_TORCH:
        return _OF_TORCH[rest]
    if namespace == "aten":
        packet, _, overload = rest.partition(".")
        target = getattr(getattr(torch.ops.aten, packet), overload or "default")
        if isinstance(target, torch._ops.OpOverload) and packet != "from_file":
            return target
    raise ArtifactError(f"not a program: it calls {name!r}, which a program may not")


def _encode(value: Any) -> Any:
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, (list, tuple)):
        return [_encode(item) for item in value]
    if isinstance(value, dict):
        return {key: _encode(item) for key, item in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, torch.device):
        return {"device": str(value)}
    for name, kind in _TORCH_TYPES.items():
        if isinstance(value, kind):
            return {name: str(value).removeprefix("torch.")}
    raise ArtifactError(f"a program cannot hold an argument of type {type(value).__name__}: {value!r}")


def _decode(value: Any, nodes: dict[str, fx.Node], device: torch.device) -> Any:
    if isinstance(value, list):
        return [_decode(item, nodes, device) for item in value]
    if not isinstance(value, dict):
        return value
    if len(value) == 1:
        ((key, item),) = value.items()
        if key == "node":
            return nodes[item]
        if key == "float":
            return float(item)
        if key == "device":
            return device
        if key in _TORCH_TYPES and isinstance(getattr(torch, str(item), None), _TORCH_TYPES[key]):
            return getattr(torch, item)
    return {key: _decode(item, nodes, device) for key, item in value.items()}


def value_to_json(value: Value) -> dict[str, Any]:
    """Facts about an input or output as JSON."""
    facts = {"name": value.name, "kind": value.kind.value, "shape": list(value.shape)}
    facts |= {"dtype": str(value.dtype).removeprefix("torch.")}
    optional = {"site": value.site, "slot": value.slot, "table": value.table, "source": value.source}
    free = {"free": list(value.free)} if value.free else {}
    return facts | {key: fact for key, fact in optional.items() if fact is not None} | free


def read_value(entry: dict[str, Any]) -> Value:
    """Inverse of `value_to_json`."""
    dtype = getattr(torch, entry["dtype"])
    if not isinstance(dtype, torch.dtype):
        raise ArtifactError(f"not a program: {entry['dtype']!r} is no dtype")
    optional = {key: entry.get(key) for key in ("site", "slot", "table", "source")}
    return Value(
        entry["name"], Kind(entry["kind"]), tuple(entry["shape"]), dtype, **optional, free=tuple(entry.get("free", ()))
    )
