"""What must be true of a module before it is captured, and of the program afterwards."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from recache_compile.capture.capture import Captured
from recache_compile.capture.compat import hooks_of, is_offloaded
from recache_compile.capture.trace import evaluating
from recache_compile.errors import CaptureError, check_memory
from recache_compile.ir.signature import named_leaves, number_as_shape
from recache_compile.ir.value import Kind

TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}
"""Largest difference of a program from its module, relative to the largest value; `HALF` for all smaller types."""
HALF = 5e-2

STATE = "its forward keeps state between calls, as one with a cache patched in does; compile the model as loaded"

CHANGE = 1.07
"""Factor between the latents of the example and those that the program is checked with."""


def check_untouched(module: nn.Module, who: str) -> None:
    """Raise `CaptureError` for hooks that change what a call does, or where its weights are.

    Args:
        module: to be captured.
        who: the module's name, for the message.
    """
    for name, child in module.named_modules():
        where = f"{who}{'.' if name else ''}{name}"
        if is_offloaded(child):
            raise CaptureError(
                f"{where}: is offloaded by accelerate, which cannot be traced; call remove_all_hooks() before compiling"
            )
        if hooks := hooks_of(child):
            raise CaptureError(
                f"{where}: has the hooks {', '.join(hooks)} of diffusers (offloading, layerwise casting or a cache),"
                " which cannot be traced; compile a pipeline that was loaded without them (caches: disable_cache())"
            )


def check_modes() -> None:
    """Raise `CaptureError` inside of `torch.autocast`: engines compute in the model's own types."""
    for device in ("cpu", "cuda"):
        if torch.is_autocast_enabled(device):
            raise CaptureError(
                f"torch.autocast is on for {device}: engines compute in the model's own types; compile and call outside"
                " of it, and load the model in bfloat16 or float16 for half precision"
            )


def check_stateless(module: nn.Module, inputs: Mapping[str, Any], latents: Collection[str], who: str) -> None:
    """Raise `CaptureError` where two equal calls give different results: the module keeps state between calls.

    Caches that were patched into a `forward` do; tracing would take one of their branches for
    the model.

    Args:
        module: to be captured.
        inputs: arguments of one call.
        latents: names of the latents inputs, which are changed, so that no cache knows them.
        who: the module's name, for the message.
    """
    leaves = named_leaves(inputs)
    if any(isinstance(leaf, Tensor) and leaf.is_meta for leaf in leaves.values()):
        return
    changed = _changed(leaves, latents)
    results = []
    with torch.no_grad(), evaluating(module), torch.compiler.set_stance("force_eager"), torch.random.fork_rng():
        for _ in range(2):
            torch.manual_seed(0)
            results.append(_call(module, inputs, changed))
    first, second = results
    if _difference(first, second) > bound_of(first):
        raise CaptureError(f"capture of {who}: two equal calls give different results; {STATE}")


def check_program(module: nn.Module, inputs: Mapping[str, Any], captured: Captured, who: str) -> None:
    """Raise `CaptureError` where a program does not compute what the module does, called with other latents.

    Models that draw random numbers, and those without weights (on the meta device), are not checked.

    Args:
        module: what was captured.
        inputs: of the capture.
        captured: the program.
        who: the module's name, for the message.
    """
    leaves = named_leaves(inputs)
    values = captured.program.inputs
    given = {name: _as_tensor(leaves[name]) for name in (value.name for value in values)}
    if any(tensor.is_meta for tensor in given.values()) or _is_random(captured):
        return
    changed = _changed(leaves, [value.name for value in values if value.kind is Kind.LATENTS])
    with torch.no_grad(), evaluating(module), torch.compiler.set_stance("force_eager"):
        ours = captured.program.module(*(changed.get(name, tensor) for name, tensor in given.items()))
        try:
            theirs = _call(module, inputs, changed)
        except Exception as error:  # whatever a module does that has kept what it met while it was traced
            check_memory(error)
            raise CaptureError(
                f"capture of {who}: it cannot be called any more ({type(error).__name__}); {STATE}"
            ) from error
    difference = _difference(list(ours), theirs)
    if difference > bound_of(theirs):
        raise CaptureError(
            f"capture of {who}: the program differs from the model by {difference:.1e} where the latents are other"
            f" ones; {STATE}"
        )


def _as_tensor(leaf: Any) -> Tensor:
    """What a program takes for an argument."""
    return leaf if isinstance(leaf, Tensor) else number_as_shape(leaf)


def _changed(leaves: Mapping[str, Any], latents: Collection[str]) -> dict[str, Tensor]:
    """Other latents than those of the example."""
    found = {name: leaf for name, leaf in leaves.items() if name in latents and isinstance(leaf, Tensor)}
    return {name: tensor * CHANGE for name, tensor in found.items() if tensor.is_floating_point()}


def _call(module: nn.Module, inputs: Mapping[str, Any], changed: Mapping[str, Tensor]) -> list[Tensor]:
    """The tensors of a call's result; containers among the arguments are new: some models write to theirs."""
    names = iter(named_leaves(inputs))
    arguments = pytree.tree_map(lambda leaf: changed.get(next(names), leaf), dict(inputs))
    return [leaf for leaf in pytree.tree_leaves(module(**arguments)) if isinstance(leaf, Tensor)]


def _difference(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    """The largest difference between results, relative to the largest value; whole numbers are not compared."""
    found = [0.0]
    for one, other in zip(ours, theirs, strict=True):
        if other.is_floating_point() and other.numel():
            scale = other.double().abs().max().clamp(min=1e-30)
            found.append(float((one.double() - other.double()).abs().max() / scale))
    return max(found)  # one that is no number compares as smaller than any bound


def bound_of(results: Sequence[Tensor]) -> float:
    """The relative difference up to which results count as equal."""
    return max((TOLERANCE.get(each.dtype, HALF) for each in results if each.is_floating_point()), default=0.0)


def _is_random(captured: Captured) -> bool:
    tag = torch.Tag.nondeterministic_seeded
    quiet = ("scaled_dot_product_attention", "dropout")
    return any(
        tag in getattr(node.target, "tags", ()) and not any(name in str(node.target) for name in quiet)
        for node in captured.program.module.graph.nodes
    )
