"""Trace a module with `torch.export`, and cure what only stops export because inputs are unknown.

A model whose Python code reads the values of inputs, to decide by them or to make sizes of
them, cannot be exported for all values.  Where these inputs belong to the conditioning they
are taken as constants instead: partial evaluation with a known input.
"""

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from recache_compile.errors import CaptureError
from recache_compile.export import dotted_name, export_module, named_leaves

_TO_PYTHON = {Tensor.tolist, Tensor.numpy, Tensor.item, Tensor.__array__}
_TAGS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
_INDEXING = {Tensor.__getitem__, Tensor.__setitem__}
_REPEATING = {torch.repeat_interleave, Tensor.repeat_interleave}


@dataclass(frozen=True, slots=True)
class Trace:
    """An exported module, and the input tensors that were taken as constants, by name."""

    exported: torch.export.ExportedProgram
    constants: Mapping[str, Tensor]


def trace_module(module: nn.Module, arguments: Mapping[str, Any], variable: Collection[str]) -> Trace:
    """Export a module; inputs that its code reads become constants where export needs that.

    The module runs once before, so that what it fills lazily (rotary tables, for example)
    holds tensors afterwards, and no tracers.

    Args:
        module: called with `arguments` as keywords.
        arguments: tensors may be nested in them; they are not changed.
        variable: names of the inputs that change from step to step, which cannot be constants.

    Raises:
        CaptureError: it cannot be exported.
    """
    tensors = {name: leaf for name, leaf in named_leaves(arguments).items() if isinstance(leaf, Tensor)}
    with _evaluating(module):
        read = inputs_read(lambda: module(**_copied(arguments)), tensors)
        try:
            return Trace(_fixed_sizes(export_module(module, (), _copied(arguments))), {})
        except Exception as error:  # torch.export raises whatever the model's code provokes
            constants = {name: tensors[name] for name in sorted(read - set(variable))}
            if not constants:
                raise CaptureError(_explain(module, error, read)) from error
        try:
            with _bound(module, constants), Constants():
                return Trace(_fixed_sizes(export_module(module, (), _without(arguments, constants))), constants)
        except Exception as error:
            raise CaptureError(_explain(module, error, read & set(variable))) from error


def _explain(module: nn.Module, error: Exception, read: Collection[str]) -> str:
    reason = (str(error).strip().splitlines() or ["no message"])[0]
    message = f"capture of {type(module).__name__}: torch.export failed: {type(error).__name__}: {reason}"
    if read:
        message += (
            f" (the model's code decides by values computed from {', '.join(sorted(read))}, which change from step to"
            " step; only a change of that code would cure it)"
        )
    return message


def _fixed_sizes(exported: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """Refuse a graph with sizes that depend on the values of inputs."""
    for node in exported.graph.nodes:
        value = node.meta.get("val")
        sizes = value.shape if isinstance(value, Tensor) else (value,)
        if any(isinstance(size, torch.SymInt) and not isinstance(size.node.maybe_as_int(), int) for size in sizes):
            raise ValueError(f"the size of {node.name} depends on the values of inputs")
    return exported


@contextlib.contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
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

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.read: set[str] = set()
        self._sources = WeakTensorKeyDictionary()
        for name, tensor in tensors.items():
            self._sources[tensor] = self._sources.get(tensor, frozenset()) | {name}

    def sources(self, value: Any) -> frozenset[str]:
        """The inputs that the tensors in `value` were computed from."""
        leaves = [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]
        return frozenset().union(*(self._sources.get(leaf, ()) for leaf in leaves))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        names = self.sources((args, kwargs))
        if _TAGS & set(func.tags):
            if func.overloadpacket in (torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_):
                self.read |= self.sources([index for index in args[1] if index is not None and _is_mask(index)])
            else:
                self.read |= names
        if names:
            for leaf in pytree.tree_leaves(result):
                if isinstance(leaf, Tensor):
                    self._sources[leaf] = names | self._sources.get(leaf, frozenset())
        return result


class _PythonReads(TorchFunctionMode):
    """Sees the conversions to Python values that never become an operator."""

    def __init__(self, dependence: _Dependence) -> None:
        super().__init__()
        self._dependence = dependence

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _TO_PYTHON:
            self._dependence.read |= self._dependence.sources(args[:1])
        return func(*args, **(kwargs or {}))


class Constants(TorchFunctionMode):
    """While a model is traced: computes what depends on constants alone for real, outside of the trace."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if tensors and all(map(_is_real, tensors)):
            with unset_fake_temporarily(), disable_proxy_modes_tracing():
                return func(*args, **kwargs)
        if func in _INDEXING:
            args = (args[0], _whole_numbers(args[1]), *args[2:])
        if func in _REPEATING and len(args) > 1 and isinstance(args[1], Tensor) and _is_real(args[1]):
            kwargs = {"output_size": int(args[1].sum()), **kwargs}
        return func(*args, **kwargs)


def _is_real(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, nn.Parameter)


def _is_mask(index: Tensor) -> bool:
    return index.dtype in (torch.bool, torch.uint8)


def _whole_numbers(index: Any) -> Any:
    """Masks that are constants as whole numbers: the size of the result is then known."""
    parts = index if isinstance(index, tuple) else (index,)
    if not any(isinstance(part, Tensor) and _is_real(part) and _is_mask(part) for part in parts):
        return index
    converted: list[Any] = []
    with unset_fake_temporarily(), disable_proxy_modes_tracing():
        for part in parts:
            is_mask = isinstance(part, Tensor) and _is_real(part) and _is_mask(part)
            converted.extend(part.nonzero(as_tuple=True) if is_mask else (part,))
    return tuple(converted)
