"""Capture: a module and example inputs become a program whose inputs have roles."""

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from recache_compile.errors import CaptureError
from recache_compile.export import export_module, flatten, writes
from recache_compile.program import Kind, Program, Role, Value

ROLE_NAMES = {
    Role.LATENTS: ("hidden_states", "sample", "latents", "latent_model_input", "x"),
    Role.TIMESTEP: ("timestep", "timesteps", "t", "time", "sigma", "sigmas"),
}


@dataclass(frozen=True, slots=True)
class Signature:
    """How the model is called, apart from any shape.

    Args:
        parameters: names of the parameters of the module's `forward`, in order.
        roles: role of every tensor input.
        constants: every other input, given or by default, which the graph has taken in.
        defaults: default of every parameter that has one, as text.
        result: `torch.utils._pytree` specification of the result, as JSON.
        containers: names of the module's module lists.
    """

    parameters: tuple[str, ...]
    roles: tuple[tuple[str, Role], ...]
    constants: tuple[tuple[str, str], ...]
    defaults: tuple[tuple[str, str], ...]
    result: str
    containers: tuple[str, ...]

    def names(self, role: Role) -> tuple[str, ...]:
        """The tensor inputs of a role, in call order."""
        return tuple(name for name, its_role in self.roles if its_role is role)

    def constants_of(self, leaves: Mapping[str, Any]) -> dict[str, str]:
        """The constants of a call as text, defaults filled in; `leaves` by dotted name."""
        given = {name: repr(leaf) for name, leaf in leaves.items() if not isinstance(leaf, Tensor)}
        top = {name.partition(".")[0] for name in leaves}
        filled = {name: default for name, default in self.defaults if name not in top} | given
        filled.pop("return_dict", None)
        return filled


def capture(
    module: nn.Module,
    example_inputs: Mapping[str, Any],
    roles: Mapping[str, Role | str] | None = None,
    label: str = "0",
) -> tuple[Program, Signature]:
    """Export a module at the shapes of its example inputs.

    Args:
        module: any module; it is called with keyword arguments and `return_dict=False`
            where it has that parameter.
        example_inputs: arguments of one call.  Tensors may be nested in lists and dicts;
            their names are then dotted ("kwargs.scale").  Everything else is a constant.
        roles: overrides the role of inputs by name.
        label: tells the constants of several captures of one module apart.

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
    assigned = _assign_roles(tuple(name for name, leaf in leaves.items() if isinstance(leaf, Tensor)), roles or {})
    exported = _export(module, arguments)
    names = {id(tensor): name for name, tensor in (*module.named_parameters(), *module.named_buffers())}
    graph_module = flatten(exported, names, f"constant_{label}")
    try:
        _describe(graph_module.graph, leaves, assigned)
    except CaptureError as error:
        raise CaptureError(f"capture of {type(module).__name__}: {error}") from None
    graph_module.recompile()
    signature = Signature(
        parameters=tuple(parameters),
        roles=tuple(assigned.items()),
        constants=(),
        defaults=tuple(
            (name, repr(each.default)) for name, each in parameters.items() if each.default is not each.empty
        ),
        result=pytree.treespec_dumps(exported.call_spec.out_spec),
        containers=tuple(name for name, child in module.named_modules() if isinstance(child, nn.ModuleList)),
    )
    signature = replace(signature, constants=tuple(signature.constants_of(leaves).items()))
    return Program("capture", graph_module, ("capture",)), signature


def _export(module: nn.Module, arguments: Mapping[str, Any]) -> torch.export.ExportedProgram:
    """Export in evaluation mode, and give every submodule its own mode back."""
    modes = {child: child.training for child in module.modules()}
    module.eval()
    try:
        return export_module(module, (), arguments)
    except Exception as error:  # torch.export raises whatever the model's code provokes
        reason = str(error).strip().splitlines()
        raise CaptureError(
            f"capture of {type(module).__name__}: torch.export failed: {type(error).__name__}:"
            f" {reason[0] if reason else 'no message'}"
        ) from error
    finally:
        for child, training in modes.items():
            child.training = training


def _describe(graph: fx.Graph, leaves: Mapping[str, Any], roles: Mapping[str, Role]) -> None:
    """Put the facts about inputs and results on their nodes; drop inputs that are constants."""
    if any(map(writes, graph.nodes)):
        raise CaptureError("the model writes to its own buffers when it is called")
    for node, (name, leaf) in zip(graph.find_nodes(op="placeholder"), leaves.items(), strict=True):
        if isinstance(leaf, Tensor):
            node.meta["value"] = Value(name, Kind(roles[name]), tuple(leaf.shape), leaf.dtype)
        elif node.users:
            raise CaptureError(f"the graph reads the constant {name!r} at run time")
        else:
            graph.erase_node(node)
    values = []
    for number, result in enumerate(graph.output_node().args[0]):  # type: ignore[arg-type, union-attr]
        fake = getattr(result, "meta", {}).get("val")
        if not isinstance(fake, Tensor):
            raise CaptureError(f"result {number} is no tensor")
        values.append(Value(f"prediction_{number}", Kind.PREDICTION, tuple(fake.shape), fake.dtype))
    graph.output_node().meta["values"] = tuple(values)


def named_leaves(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Leaves of nested arguments by dotted name, in `torch.export`'s order."""
    if not any(isinstance(value, (list, tuple, dict)) for value in arguments.values()):
        return dict(arguments)
    flat, _ = pytree.tree_flatten_with_path(dict(arguments))
    return {".".join(re.sub(r"[\[\]'\"]", "", str(key)).strip(".") for key in path): leaf for path, leaf in flat}


def _assign_roles(names: tuple[str, ...], overrides: Mapping[str, Role | str]) -> dict[str, Role]:
    unknown = sorted(set(overrides) - set(names))
    if unknown:
        raise CaptureError(f"roles: {unknown} are no tensor inputs; these are: {', '.join(names)}")
    roles = {
        name: next((role for role, usual in ROLE_NAMES.items() if name in usual), Role.CONDITIONING) for name in names
    }
    for name, role in overrides.items():
        try:
            roles[name] = Role(role)
        except ValueError:
            raise CaptureError(f"roles: {role!r} for {name!r} is no role; choose one of {', '.join(Role)}") from None
    if Role.LATENTS not in roles.values():
        raise CaptureError(f"roles: no latents among {', '.join(names)}; name one with roles={{'INPUT': 'latents'}}")
    return roles
