"""Compile a case of the zoo and compare it with the original and with the hook reference."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from unittest import mock

from torch import Tensor, nn
from torch.utils import _pytree as pytree

import recache_compile as rc
from recache_compile.capture.capture import Captured, capture
from recache_compile.compiler import captures as compiler
from recache_compile.compiler.compiled import Compiled
from recache_compile.ir.value import Kind
from tests.reference import CachedReference, changed_latents
from tests.zoo.base import Case, Draw

NUM_STEPS = 6
BUDGET = 3


@dataclass(frozen=True, slots=True)
class Checked:
    """What a case gave.

    Args:
        sites: number of cache sites.
        bytes_per_anchor: features of one recompute step.
        hoisted: share of the parameters that are out of the step programs.
        full_error: largest error at budget = T against the original, relative to the largest value.
        cached_error: the same at budget = T/2 against the reference; None where there is no reference.
        baked: inputs that were taken as constants.
    """

    sites: int
    bytes_per_anchor: int
    hoisted: float
    full_error: float
    cached_error: float | None
    baked: tuple[str, ...]


class Checker:
    """One case under every granularity; they differ in what follows the capture, which is made once."""

    def __init__(self, case: Case) -> None:
        self._module = case.build()
        self._inputs = case.inputs(Draw(0))
        self._roles = case.roles
        self._captures: dict[str, Captured] = {}

    def check(self, granularity: str, runtime: str = "eager") -> Checked:
        """Compile and run T steps under both budgets."""
        module = self._module
        inputs = pytree.tree_map(lambda leaf: leaf, self._inputs)  # some models add to the dicts they are given
        with mock.patch.object(compiler, "capture", self._capture):
            compiled = rc.compile(
                module, inputs, budgets=(BUDGET, NUM_STEPS), num_steps=NUM_STEPS,
                granularity=granularity, runtime=runtime, roles=self._roles,
            )  # fmt: skip
        steps = [step_inputs(compiled, inputs, step) for step in range(NUM_STEPS)]
        expected = [original(module, each) for each in steps]
        full = compiled.dispatcher(NUM_STEPS)
        full_error = max(distance(full(step=i, **each), expected[i]) for i, each in enumerate(steps))
        cached_error = None
        if granularity in ("stack", "block"):
            latents = compiled.variants[0].names(Kind.LATENTS)
            reference = CachedReference(
                module, inputs, latents, compiled.schedules[BUDGET].recompute_steps, increments=granularity == "block"
            )
            run = compiled.dispatcher(BUDGET)
            cached_error = max(distance(run(step=i, **each), reference(i, **each)) for i, each in enumerate(steps))
        features = [value for value in compiled.variants[0].programs["recompute"].outputs if value.kind is Kind.FEATURE]
        prologue = compiled.variants[0].programs.get("prologue")
        hoisted = prologue.num_parameters if prologue else 0
        return Checked(
            sites=len(features),
            bytes_per_anchor=sum(value.nbytes for value in features),
            hoisted=hoisted / max(1, sum(weight.numel() for weight in compiled.weights.values())),
            full_error=full_error,
            cached_error=cached_error,
            baked=tuple(compiled.variants[0].fixed),
        )

    def _capture(self, module: nn.Module, inputs: Mapping[str, Any], roles: Any, label: str, free: Any) -> Captured:
        if label not in self._captures:
            self._captures[label] = capture(module, inputs, roles, label, free)
        return self._captures[label]


def step_inputs(compiled: Compiled, inputs: Mapping[str, Any], step: int) -> dict[str, Any]:
    """The arguments of one step: noisier latents, an earlier timestep, the same conditioning."""
    times = compiled.variants[0].names(Kind.TIMESTEP)
    changed = changed_latents(inputs, compiled.variants[0].names(Kind.LATENTS), 0.05 * step, seed=step)

    def earlier(path: Any, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or dotted(path) not in times:
            return leaf
        return leaf * (1 - 0.1 * step) if leaf.is_floating_point() else (leaf - step).clamp(min=1)

    return pytree.tree_map_with_path(earlier, changed)


def dotted(path: Any) -> str:
    """A path of `torch.utils._pytree` as the product writes it."""
    return ".".join(str(getattr(key, "key", getattr(key, "idx", ""))) for key in path)


def original(module: nn.Module, inputs: Mapping[str, Any]) -> Any:
    """The module's own result."""
    plain = {"return_dict": False} if "return_dict" in inspect.signature(module.forward).parameters else {}
    return module(
        **pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, dict(inputs)), **plain
    )


def distance(result: Any, expected: Any) -> float:
    """Largest difference of two results, relative to the largest value of the second."""
    ours, theirs = (
        [leaf for leaf in pytree.tree_leaves(each) if isinstance(leaf, Tensor)] for each in (result, expected)
    )
    assert [leaf.shape for leaf in ours] == [leaf.shape for leaf in theirs]
    return max(
        float((one.double() - other.double()).abs().max() / other.double().abs().max().clamp(min=1e-12))
        for one, other in zip(ours, theirs, strict=True)
    )
