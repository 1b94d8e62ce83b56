"""What the package uses of torch and diffusers that is not public, or that not every release has, in one place.

A new release is made to work here; `tests/capture/test_compat.py` has a test of each function, and
`tests/test_layout.py` names the files outside that know a private name too, because they lie below this one (`ir`),
or because nobody else needs it (a runtime, the benchmark).
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing
from torch.nn.attention import flex_attention
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

__all__ = ["FakeTensorMode", "TorchDispatchMode", "WeakTensorKeyDictionary", "detect_fake_mode"]


def base_of(tensor: Tensor) -> Tensor | None:
    """The tensor in whose memory a view lies; `torch.export` guards on it."""
    return tensor._base


def writes_to(tensor: Tensor) -> int:
    """How many writes a tensor's memory has seen; 0 where nobody counts them (under inference mode)."""
    return 0 if tensor.is_inference() else tensor._version


def is_traced(tensor: Tensor) -> bool:
    """Whether a tensor stands for a value of the graph that is being made."""
    return type(tensor) not in (Tensor, nn.Parameter) or torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def is_mapped(node: fx.Node) -> bool:
    """Whether a node begins or ends a function that `torch.vmap` maps; decomposing makes ordinary calls of them."""
    return getattr(node.target, "__module__", None) == "torch._functorch.predispatch"


def writes(node: fx.Node) -> bool:
    """Whether a call writes to one of its arguments."""
    schema = getattr(node.target, "_schema", None)  # functions of Python and higher-order operators have none
    return schema is not None and schema.is_mutable


class TraceableWrites(TorchFunctionMode):
    """While a model is traced: writes that a tracer does not see, or cannot follow, in another way.

    `tensor.data` is `tensor.detach()`: both lie in the tensor's memory, but what is written to `.data` is
    hidden from a tracer, which then holds a tensor that nobody filled (the positions of CogVideoX at other
    sizes, for example).  A diagonal that is filled is a mask that is: the one writes through a view with
    strides of its own, which cannot be made functional (the perturbed attention of SD3).
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func == Tensor.data.__get__:  # type: ignore[attr-defined]
            return args[0].detach()
        if func == Tensor.fill_diagonal_ and args[0].dim() == 2 and len(args) == 2 and not kwargs:
            rows, columns = (torch.arange(size, device=args[0].device) for size in args[0].shape)
            return args[0].masked_fill_(rows[:, None] == columns, args[1])
        return func(*args, **(kwargs or {}))


def is_operator(node: fx.Node) -> bool:
    """Whether a node calls an operator of torch, which has a schema."""
    return node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload)


def arguments_of(node: fx.Node) -> dict[str, Any]:
    """All arguments of an operator's call by name, defaults included."""
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    given = {argument.name: argument.default_value for argument in schema}
    return given | dict(zip((argument.name for argument in schema), node.args, strict=False)) | dict(node.kwargs)


def is_offloaded(module: nn.Module) -> bool:
    """Whether a hook of accelerate moves a module's weights when it is called."""
    return hasattr(module, "_hf_hook")


def hooks_of(module: nn.Module) -> tuple[str, ...]:
    """Names of the hooks that diffusers has put around a module's call."""
    return tuple(getattr(getattr(module, "_diffusers_hook", None), "hooks", ()))


def uncompiled(module: Any) -> Any:
    """What `torch.compile` has wrapped, else the module itself."""
    return getattr(module, "_orig_mod", module)


def progress_bar_of(pipeline: Any) -> dict[str, Any]:
    """How a pipeline of diffusers shows its progress, to be set again afterwards."""
    return dict(getattr(pipeline, "_progress_bar_config", {}))


@contextlib.contextmanager
def on_values(values: Any) -> Iterator[None]:
    """Call operators on values of a graph, in the mode of those among them that have no memory.

    Some operators are made of others in C++, which torch 2.11 refuses where a size is free: their Python versions do.
    """
    with detect_fake_mode(values) or torch.no_grad(), enable_python_dispatcher():
        yield


@contextlib.contextmanager
def leaving_nothing(tensors: Iterable[Tensor]) -> Iterator[None]:
    """While something is exported: marks of free sizes go from tensors again, and mapped functions are left.

    A failure leaves both behind: the next export would obey the marks, and random numbers would be refused.
    """
    given = [(tensor, set(vars(tensor))) for tensor in tensors]
    level = torch._C._functorch.maybe_current_level() or 0
    try:
        yield
    finally:
        for tensor, before in given:
            for mark in [name for name in vars(tensor) if name.startswith("_dynamo_") and name not in before]:
                delattr(tensor, mark)
        while (torch._C._functorch.maybe_current_level() or 0) > level:
            torch._C._functorch._vmap_decrement_nesting()


@contextlib.contextmanager
def outside_of_the_trace() -> Iterator[None]:
    """Compute for real in the middle of a trace."""
    with unset_fake_temporarily(), disable_proxy_modes_tracing():
        yield


@contextlib.contextmanager
def flex_attention_as(attend: Callable[..., Any]) -> Iterator[None]:
    """Let another function stand for `flex_attention`, which models look up when they call it."""
    original = flex_attention.flex_attention
    flex_attention.flex_attention = attend
    try:
        yield
    finally:
        flex_attention.flex_attention = original
