"""Capture: a module and example inputs become a program whose inputs have roles."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from types import FunctionType, MappingProxyType, MethodType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from recache_compile.capture.compat import writes
from recache_compile.capture.export import flatten
from recache_compile.capture.free_sizes import FreeSizes, conditions_of, take_as_shape
from recache_compile.capture.roles import assign_roles
from recache_compile.capture.trace import trace_module
from recache_compile.errors import CaptureError
from recache_compile.ir.meta import describe_input, describe_outputs, number_nodes, result_of, tensor_of
from recache_compile.ir.program import PassRecord, Program
from recache_compile.ir.signature import Signature, named_leaves
from recache_compile.ir.sizes import is_free
from recache_compile.ir.value import Kind, Value

CONSTANT_PREFIX = "constant_"
"""Begins the names of tensors that the model's code made, which are no weights."""


@dataclass(frozen=True, slots=True)
class Captured:
    """What `capture` made.

    Args:
        program: the graph.
        signature: how the model is called.
        constants: the inputs that are no tensors, given or by default, which the graph has
            taken in; as text.
        fixed: the tensor inputs that it has taken in.
        containers: dotted names of the module lists, whose members are the repeated blocks.
        conditions: what must hold of free sizes, see `capture.free_sizes`.
    """

    program: Program
    signature: Signature
    constants: tuple[tuple[str, str], ...]
    fixed: Mapping[str, Tensor]
    containers: tuple[str, ...]
    conditions: tuple[str, ...] = ()


def capture(
    module: nn.Module,
    example_inputs: Mapping[str, Any],
    roles: Mapping[str, Kind | str] | None = None,
    label: str = "0",
    free: FreeSizes = MappingProxyType({}),
) -> Captured:
    """Export a module at the shapes of its example inputs.

    Args:
        module: any module; it is called with keyword arguments and `return_dict=False`
            where it has that parameter.
        example_inputs: arguments of one call.  Tensors may be nested in lists and dicts;
            their names are then dotted ("kwargs.scale").  Everything else is a constant.
        roles: overrides the role of inputs by name.
        label: tells the constants of several captures of one module apart.
        free: dimensions of inputs whose size is to stay free; where the model's code decides it, it is
            fixed all the same.

    Raises:
        CaptureError: the module cannot be exported, an input is no parameter of it, a role
            names no input, there is no latents input, or a result is no tensor.
    """
    parameters = inspect.signature(module.forward).parameters
    arguments = dict(example_inputs)
    variadic = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    unknown = sorted(set(arguments) - set(parameters))
    if unknown and not variadic:
        raise CaptureError(
            f"capture of {type(module).__name__}: it has no input {unknown}; it takes {list(parameters)}"
        )
    if "return_dict" in parameters:
        arguments["return_dict"] = False
    leaves = named_leaves(arguments)
    if functions := [name for name, leaf in leaves.items() if isinstance(leaf, FunctionType | MethodType)]:
        raise CaptureError(
            f"capture of {type(module).__name__}: its input {functions[0]} is a function, which no program takes;"
            " compile calls without one (of models with a key-value cache, those that do not fill it)"
        )
    assigned = assign_roles([name for name, leaf in leaves.items() if isinstance(leaf, Tensor)], roles or {})
    variable = [name for name, role in assigned.items() if role is not Kind.CONDITIONING]
    trace = trace_module(module, arguments, variable, free)
    names = {id(tensor): name for name, tensor in (*module.named_parameters(), *module.named_buffers())}
    try:
        graph_module = flatten(trace.exported, names, f"{CONSTANT_PREFIX}{label}", _device_of(leaves))
        tensors = _describe(graph_module.graph, leaves, assigned, trace.constants)
    except CaptureError as error:
        raise CaptureError(f"capture of {type(module).__name__}: {error}") from None
    graph_module.recompile()
    program = Program("capture", graph_module, (PassRecord("capture"),))
    numbers = {value.name for value in program.inputs if value.kind is Kind.SHAPE}
    signature = Signature(
        parameters=tuple(parameters),
        defaults=tuple(
            (name, repr(each.default)) for name, each in parameters.items() if each.default is not each.empty
        ),
        result=pytree.treespec_dumps(trace.exported.call_spec.out_spec),
        tensors=tensors,
    )
    return Captured(
        program=program,
        signature=signature,
        constants=tuple(
            (name, text) for name, text in signature.constants(arguments, leaves).items() if name not in numbers
        ),
        fixed={name: value.detach().clone() for name, value in trace.constants.items()},
        containers=tuple(name for name, child in module.named_modules() if isinstance(child, nn.ModuleList)),
        conditions=conditions_of(trace.exported),
    )


def _device_of(leaves: Mapping[str, Any]) -> torch.device | None:
    """Where a program runs that is captured with these inputs; None on the meta device, where constants keep values."""
    device = next(leaf.device for leaf in leaves.values() if isinstance(leaf, Tensor))
    return None if device.type == "meta" else device


def _describe(
    graph: fx.Graph, leaves: Mapping[str, Any], roles: Mapping[str, Kind], fixed: Mapping[str, Tensor]
) -> tuple[bool, ...]:
    """Put the facts about inputs and results on their nodes and number them; drop inputs that are constants.

    Returns:
        Which leaves of the result are tensors.
    """
    if any(map(writes, graph.nodes)):
        raise CaptureError("the model writes to its inputs or to its own buffers when it is called")
    for node, (name, leaf) in zip(graph.find_nodes(op="placeholder"), leaves.items(), strict=True):
        if isinstance(leaf, Tensor) and name not in fixed:
            describe_input(node, Value.like(tensor_of(node), name, roles[name]))
        elif is_free(result_of(node)):
            taken = take_as_shape(graph, node)
            describe_input(taken, Value.like(tensor_of(taken), name, Kind.SHAPE))
        elif node.users:
            raise CaptureError(f"the graph reads the constant {name!r} at run time")
        else:
            graph.erase_node(node)
    output = graph.output_node()
    given: Any = output.args[0]
    results: list[Value] = []
    for number, result in enumerate(given):
        fake = result_of(result) if isinstance(result, fx.Node) else None
        if isinstance(fake, Tensor):
            results.append(Value.like(fake, f"prediction_{len(results)}", Kind.PREDICTION))
        elif result is not None:
            raise CaptureError(
                f"result {number} is neither a tensor nor None, but {result!r}, which no program returns; compile calls"
                " that return tensors alone (of models with a key-value cache, those without one)"
            )
    describe_outputs(output, results)
    output.args = ([result for result in given if result is not None],)
    number_nodes(graph)
    return tuple(result is not None for result in given)
