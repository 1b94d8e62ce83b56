"""Keeps how a module is called, without running it more than once for each kind of call."""

import contextlib
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from recache_compile.capture.check import check_untouched
from recache_compile.capture.processors import PROCESSORS, processors_of, processors_text
from recache_compile.ir.signature import call_kind, named_leaves, open_objects

ANSWER = 2**-7
"""Every value of a recorder's answers."""


@dataclass(slots=True)
class CallRecorder:
    """Takes the place of a module's `forward`: keeps the arguments of each call and answers with the same small values.

    Args:
        module: whose place it takes.
        forward: of the module; runs once for each kind of call.
        at_rest: its attention processors, before the pipeline was called.
        processors: those of calls under others, by `processors_text`.
        calls: arguments of the calls so far, by name.
        answers: by kind of call.
    """

    module: nn.Module
    forward: Any
    at_rest: Mapping[str, Any]
    processors: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    calls: list[dict[str, Any]] = field(default_factory=list)
    answers: dict[Any, Any] = field(default_factory=dict)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Keep a call; a result of the right shape.

        Raises:
            CaptureError: the pipeline has put hooks around its transformer for the call.
        """
        inputs = with_own_containers(bind(inspect.signature(self.forward), args, kwargs))
        now = processors_of(self.module)
        if text := processors_text(now, self.at_rest):
            inputs[PROCESSORS] = text
            self.processors[text] = now
        kind = call_kind(named_leaves(inputs))
        if kind not in self.answers:
            check_untouched(self.module, type(self.module).__name__)
            self.answers[kind] = self._answer(*with_own_containers((args, kwargs)))
        self.calls.append(inputs)
        return self.answers[kind]

    def _answer(self, args: Any, kwargs: Any) -> Any:
        """A result of the right shape, where the arguments are; the module may be on the meta device.

        It is not zero, so that whatever the pipeline denoises is another value in each step.
        """
        open_objects({"args": args, **kwargs})
        device = next(leaf.device for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
        if next(self.module.parameters()).is_meta:
            args, kwargs = pytree.tree_map_only(Tensor, lambda tensor: tensor.to("meta"), (args, kwargs))
        result = self.forward(*args, **kwargs)
        return pytree.tree_map_only(Tensor, lambda tensor: torch.full_like(tensor, ANSWER, device=device), result)


@contextlib.contextmanager
def recording(module: nn.Module) -> Iterator[CallRecorder]:
    """A recorder in the place of a module's `forward`."""
    recorder = CallRecorder(module, module.forward, processors_of(module))
    own = vars(module).get("forward")  # offloading puts one there
    module.forward = recorder  # type: ignore[method-assign, assignment]
    try:
        yield recorder
    finally:
        del module.forward
        if own is not None:
            module.forward = own  # type: ignore[method-assign]


def with_own_containers(tree: Any) -> Any:
    """The same leaves in lists and dicts of their own: some models add to those that they are given, or take away."""
    return pytree.tree_map(lambda leaf: leaf, tree, is_leaf=lambda node: not isinstance(node, (list, tuple, dict)))


def bind(signature: inspect.Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name, those for `**kwargs` beside the others."""
    bound = dict(signature.bind(*args, **kwargs).arguments)
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            bound |= bound.pop(name, {})
    return bound
