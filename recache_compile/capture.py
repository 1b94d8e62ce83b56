"""Capture: a module and example inputs become a program whose inputs have roles."""

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
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
        constants: every other input, which the graph has taken in as a constant.
        result: `torch.utils._pytree` specification of the result, as JSON.
        containers: names of the module's module lists.
    """

    parameters: tuple[str, ...]
    roles: tuple[tuple[str, Role], ...]
    constants: tuple[tuple[str, str], ...]
    result: str
    containers: tuple[str, ...]

    def names(self, role: Role) -> tuple[str, ...]:
        """The tensor inputs of a role, in call order."""
        return tuple(name for name, its_role in self.roles if its_role is role)


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
    tensors = {name: leaf for name, leaf in leaves.items() if isinstance(leaf, Tensor)}
    assigned = _assign_roles(tuple(tensors), roles or {})

    module_was_training = module.training
    module.eval()
    try:
        exported = export_module(module, (), arguments)
    except Exception as error:  # torch.export raises whatever the model's code provokes
        reason = str(error).strip().splitlines()
        raise CaptureError(
            f"capture of {type(module).__name__}: torch.export failed: {type(error).__name__}:"
            f" {reason[0] if reason else 'no message'}"
        ) from error
    finally:
        module.train(module_was_training)
    names = {id(tensor): name for name, tensor in (*module.named_parameters(), *module.named_buffers())}
    graph_module = flatten(exported, names, f"constant_{label}")
    graph = graph_module.graph
    for node, (name, leaf) in zip(graph.find_nodes(op="placeholder"), leaves.items(), strict=True):
        if isinstance(leaf, Tensor):
            node.meta["value"] = Value(name, Kind(assigned[name]), tuple(leaf.shape), leaf.dtype)
        elif node.users:
            raise CaptureError(f"capture of {type(module).__name__}: the graph reads the constant {name!r} at run time")
        else:
            graph.erase_node(node)
    if any(map(writes, graph.nodes)):
        raise CaptureError(f"capture of {type(module).__name__}: the model writes to its own buffers when it is called")
    results = graph.output_node().args[0]
    assert isinstance(results, list)
    for number, result in enumerate(results):
        if not isinstance(getattr(result, "meta", {}).get("val"), Tensor):
            raise CaptureError(f"capture of {type(module).__name__}: result {number} is no tensor")
    graph.output_node().meta["values"] = tuple(
        Value(f"prediction_{number}", Kind.PREDICTION, tuple(result.meta["val"].shape), result.meta["val"].dtype)
        for number, result in enumerate(results)
    )
    graph_module.recompile()
    signature = Signature(
        parameters=tuple(parameters),
        roles=tuple(assigned.items()),
        constants=tuple((name, repr(leaf)) for name, leaf in leaves.items() if not isinstance(leaf, Tensor)),
        result=pytree.treespec_dumps(exported.call_spec.out_spec),
        containers=tuple(name for name, child in module.named_modules() if isinstance(child, nn.ModuleList)),
    )
    return Program("capture", graph_module, ("capture",)), signature


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
