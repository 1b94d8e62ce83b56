"""Trace a module with `torch.export`, and remedy what stops export only because inputs are unknown.

A model whose Python code reads the values of inputs, to decide by them or to make sizes of
them, cannot be exported for all values.  Where these inputs belong to the conditioning they
are taken as constants instead: partial evaluation with a known input.
"""

import contextlib
import logging
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from recache_compile.capture.compat import TorchDispatchMode, WeakTensorKeyDictionary, base_of
from recache_compile.capture.export import export_module
from recache_compile.capture.free_sizes import FreeSizes, all_free, dynamic, keeping_sizes
from recache_compile.capture.higher_order import ordinary_attention
from recache_compile.capture.known_values import READS, TO_PYTHON, KnownValues, is_mask
from recache_compile.errors import CaptureError, check_memory, first_line
from recache_compile.ir.signature import dotted_name, named_leaves, open_objects
from recache_compile.ir.sizes import is_free

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Trace:
    """An exported module, and the input tensors that were taken as constants, by name."""

    exported: torch.export.ExportedProgram
    constants: Mapping[str, Tensor]


def trace_module(
    module: nn.Module, arguments: Mapping[str, Any], variable: Collection[str], free: FreeSizes = MappingProxyType({})
) -> Trace:
    """Export a module; inputs that its code reads become constants where export needs that.

    The module runs once before, so that what it fills lazily (rotary tables, for example)
    holds tensors afterwards, and no tracers.

    Args:
        module: called with `arguments` as keywords.
        arguments: tensors may be nested in them; they are not changed.
        variable: names of the inputs that change from step to step, which cannot be constants.
        free: sizes that are to stay free.  Then no input becomes a constant.

    Raises:
        CaptureError: it cannot be exported.
    """
    open_objects(arguments)
    tensors = {name: leaf for name, leaf in named_leaves(arguments).items() if isinstance(leaf, Tensor)}
    # Parts that are compiled already would hide what they do.
    with evaluating(module), torch.compiler.set_stance("force_eager"):
        given = _copied(arguments)
        attributes = _attributes(given)
        try:
            read = inputs_read(lambda: module(**given), tensors)
        except Exception as error:
            check_memory(error)
            raise CaptureError(
                f"capture of {type(module).__name__}: it cannot be called with this example: {type(error).__name__}:"
                f" {first_line(error)}"
            ) from error
        if _attributes(given) != attributes:
            raise CaptureError(
                f"capture of {type(module).__name__}: it writes to an object among its arguments, which a program"
                " cannot; compile the calls that only read it"
            )
        if free:
            try:
                return Trace(_with_free_sizes(module, arguments, free), {})
            except Exception as error:
                check_memory(error)
                raise CaptureError(_explain(module, error, read & set(variable))) from error
        try:
            with ordinary_attention():
                return Trace(_known_sizes(export_module(module, (), _copied(arguments))), {})
        except Exception as error:  # torch.export raises whatever the model's code provokes
            check_memory(error)
            log.debug("%s: export with all inputs open failed", type(module).__name__, exc_info=True)
        constants = {name: tensors[name] for name in sorted(read - set(variable))}
        try:
            with _bound(module, constants), ordinary_attention(), KnownValues():
                return Trace(_known_sizes(export_module(module, (), _without(arguments, constants))), constants)
        except Exception as error:
            check_memory(error)
            raise CaptureError(_explain(module, error, read & set(variable))) from error


def _with_free_sizes(module: nn.Module, arguments: Mapping[str, Any], free: FreeSizes) -> torch.export.ExportedProgram:
    """An export with as many free sizes as there can be: once more with stand-ins where code makes numbers of them."""
    shapes = _replaced(arguments, lambda name, leaf: dynamic(name, leaf, free))
    failure: Exception | None = None
    found: torch.export.ExportedProgram | None = None
    for stand_ins in (contextlib.nullcontext(), keeping_sizes(module)):
        try:
            with ordinary_attention(), stand_ins:
                exported = _known_sizes(export_module(module, (), _copied(arguments), shapes))
        except Exception as error:  # noqa: BLE001  # whatever the model's code provokes; the first one is told
            check_memory(error)
            failure = failure or error
            continue
        if all_free(exported, free):
            return exported
        found = exported  # what the second time leaves free is at least what the first did
    if found is None:
        assert failure is not None
        raise failure
    return found


def _explain(module: nn.Module, error: Exception, read: Collection[str]) -> str:
    message = f"capture of {type(module).__name__}: torch.export failed: {type(error).__name__}: {first_line(error)}"
    if read:
        message += (
            f" (the model's code decides by values computed from {', '.join(sorted(read))}, which change from step to"
            " step; only a change of that code would help)"
        )
    return message


def _known_sizes(exported: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """Refuse a graph with sizes that depend on the values of inputs, or with numbers that are no sizes."""
    for node in exported.graph.nodes:
        value = node.meta.get("val")
        sizes = value.shape if isinstance(value, Tensor) else (value,)
        if any(map(_is_unknown, sizes)):
            raise ValueError(f"the size or value of {node.name} depends on the values of inputs")
    return exported


def _is_unknown(size: Any) -> bool:
    if is_free(size):
        return bool(free_unbacked_symbols(size))
    return isinstance(size, (torch.SymFloat, torch.SymBool)) and bool(size.node.is_symbolic())


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode; afterwards every submodule gets its own mode back."""
    modes = {child: child.training for child in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for child, training in modes.items():
            child.training = training


@contextlib.contextmanager
def _bound(module: nn.Module, constants: Mapping[str, Tensor]) -> Iterator[None]:
    """Let the module's `forward` fill constants in for itself."""
    own, forward = vars(module).get("forward"), module.forward

    def call(**arguments: Any) -> Any:
        return forward(**_replaced(arguments, lambda name, leaf: constants.get(name, leaf)))

    module.forward = call  # type: ignore[method-assign]
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own  # type: ignore[method-assign]


def _attributes(arguments: Mapping[str, Any]) -> list[int]:
    """What the objects among the arguments hold, by identity.  (Containers are left out: a copy is given.)"""
    leaves = pytree.tree_leaves(dict(arguments), is_leaf=lambda value: hasattr(value, "__dict__"))
    objects = [leaf for leaf in leaves if hasattr(leaf, "__dict__") and not isinstance(leaf, Tensor)]
    return [id(leaf) for each in objects for leaf in pytree.tree_leaves(each)]


def _without(arguments: Mapping[str, Any], constants: Mapping[str, Tensor]) -> dict[str, Any]:
    return _replaced(arguments, lambda name, leaf: None if name in constants else leaf)


def _copied(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """New containers with the same leaves: some models add to the lists and dicts they are given."""
    return _replaced(arguments, lambda name, leaf: leaf)


def _replaced(arguments: Mapping[str, Any], leaf: Callable[[str, Any], Any]) -> dict[str, Any]:
    return pytree.tree_map_with_path(  # type: ignore[no-any-return]
        lambda path, value: leaf(dotted_name(path), value), dict(arguments)
    )


def inputs_read(call: Callable[[], Any], tensors: Mapping[str, Tensor]) -> frozenset[str]:
    """Run a model once and name the input tensors whose values its code reads.

    Args:
        call: runs the model on these very tensors.
        tensors: the inputs by name.
    """
    with _Dependence(tensors) as dependence, _PythonReads(dependence), torch.no_grad():
        call()
    return frozenset(dependence.read)


class _Dependence(TorchDispatchMode):
    """Follows every value back to the inputs that it was computed from."""

    supports_higher_order_operators = True

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.read: set[str] = set()
        self._sources = WeakTensorKeyDictionary()
        for name, tensor in tensors.items():
            self._add(tensor, frozenset({name}))

    def sources(self, value: Any) -> frozenset[str]:
        """The inputs that the tensors in `value` were computed from."""
        found: frozenset[str] = frozenset()
        for leaf in _tensors(value):
            found |= self._sources.get(leaf, frozenset())
            if (base := base_of(leaf)) is not None:  # written through another view
                found |= self._sources.get(base, frozenset())
        return found

    def _add(self, tensor: Tensor, names: frozenset[str]) -> None:
        self._sources[tensor] = names | self._sources.get(tensor, frozenset())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tags, schema = getattr(func, "tags", ()), getattr(func, "_schema", None)  # higher-order operators have none
        names = self.sources((args, kwargs))
        if READS & set(tags):
            is_index = func.overloadpacket is torch.ops.aten.index
            masks = [index for index in args[1] if index is not None and is_mask(index)] if is_index else []
            self.read |= self.sources(masks) if is_index else names
        result = func(*args, **kwargs)
        for leaf in _tensors(result) if names else ():
            self._add(leaf, names)
            if (base := base_of(leaf)) is not None and schema is not None and schema.is_mutable:
                self._add(base, names)
        return result


class _PythonReads(TorchFunctionMode):
    """Sees the conversions to Python values that never become an operator."""

    def __init__(self, dependence: _Dependence) -> None:
        super().__init__()
        self._dependence = dependence

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in TO_PYTHON:
            self._dependence.read |= self._dependence.sources(args[:1])
        return func(*args, **(kwargs or {}))


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]
