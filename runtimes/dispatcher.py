"""The denoising loop's side of a compiled model: one engine call per step."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from recache_compile.capture import Signature, named_leaves
from recache_compile.errors import DispatchError
from recache_compile.plan import Plan
from recache_compile.program import Kind, Value
from recache_compile.runtimes.base import Variant
from recache_compile.runtimes.tables import Tables


@dataclass(slots=True)
class _State:
    """What one guidance branch at one shape carries from step to step."""

    variant: Variant
    tables: Tables | None
    history: dict[tuple[int | None, int | None], Tensor] = field(default_factory=dict)
    last_step: int = -1


class Dispatcher:
    """The same model call, step by step, under one budget.

    Calls are `run(step=i, **model_inputs)` and return what the module returns with
    `return_dict=False`.  Steps run in order; step 0 starts a new generation.  Guidance
    branches and input shapes each have a state of their own.

    Args:
        plan: what each step runs.
        variants: programs and engines, one for each set of input shapes.
        signature: how the model is called.
    """

    def __init__(self, plan: Plan, variants: Sequence[Variant], signature: Signature) -> None:
        self.plan = plan
        self._signature = signature
        self._constants = dict(signature.constants)
        self._result = pytree.treespec_loads(signature.result)
        self._variants = {
            _key((value.name, value.shape, value.dtype) for value in each.inputs): each for each in variants
        }
        self._device = variants[0].device
        self._coefficients = [
            torch.tensor(step.coefficients, dtype=torch.float32, device=self._device) for step in plan.steps
        ]
        self._states: dict[tuple[str, Any], _State] = {}

    def reset(self) -> None:
        """Forget every generation in progress and its history."""
        for state in self._states.values():
            state.history.clear()
            state.last_step = -1

    def __call__(self, *, step: int, branch: str = "", **model_inputs: Any) -> Any:
        """One model call of one denoising step.

        Args:
            step: index i of the step, 0..T-1.
            branch: name of the guidance branch ("cond", "uncond"), where there are several.
            model_inputs: the module's arguments.

        Raises:
            DispatchError: an input, its shape, dtype or device is not what was compiled; a
                constant differs; or the step does not follow the last one.
        """
        tensors = self._tensors(model_inputs)
        state = self._state(branch, tensors)
        if not 0 <= step < len(self.plan.steps):
            raise DispatchError(f"step {step}: expected 0..{len(self.plan.steps) - 1}")
        if step not in (0, state.last_step + 1):
            raise DispatchError(
                f"step {step} does not follow step {state.last_step}: run the steps in order, or start again at step 0"
            )
        state.last_step = -1  # until this step has succeeded
        if state.tables is not None:
            if step == 0:
                state.tables.restart()
            state.tables.prepare(step, tensors)
        this = self.plan.steps[step]
        program = state.variant.programs[this.program]
        arguments = [self._argument(state, value, step, tensors) for value in program.inputs]
        results = state.variant.engines[this.program](arguments)
        predictions = []
        for value, result in zip(program.outputs, results, strict=True):
            if value.kind is Kind.FEATURE:
                state.history[value.site, this.slot] = result
            else:
                predictions.append(result)
        state.last_step = step
        if state.tables is not None and step == len(self.plan.steps) - 1:
            state.tables.finish()
        return pytree.tree_unflatten(predictions, self._result)

    def _argument(self, state: _State, value: Value, step: int, tensors: Mapping[str, Tensor]) -> Tensor:
        if value.kind is Kind.HISTORY:
            return state.history[value.site, value.slot]
        if value.kind is Kind.COEFFICIENTS:
            return self._coefficients[step]
        if value.kind in (Kind.TABLE_ROW, Kind.FIXED):
            assert state.tables is not None
            return state.tables.read(value, step)
        return tensors[value.name].contiguous()

    def _state(self, branch: str, tensors: Mapping[str, Tensor]) -> _State:
        key = _key((name, tensor.shape, tensor.dtype) for name, tensor in tensors.items())
        state = self._states.get((branch, key))
        if state is None:
            variant = self._variants.get(key)
            if variant is None:
                raise DispatchError(self._no_variant(tensors))
            tables = Tables(variant, self.plan) if "prologue" in variant.programs else None
            state = self._states[branch, key] = _State(variant, tables)
        return state

    def _tensors(self, model_inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        """The tensor inputs in capture order, once the constants are known to be the captured ones."""
        leaves = named_leaves(model_inputs)
        tensors = {}
        for name, _ in self._signature.roles:
            tensor = leaves.pop(name, None)
            if not isinstance(tensor, Tensor):
                raise DispatchError(f"input {name!r} is missing or no tensor; it was one when the model was captured")
            if tensor.device != self._device:
                raise DispatchError(f"input {name!r} is on {tensor.device}, the engines are on {self._device}; move it")
            tensors[name] = tensor
        given = self._signature.constants_of(leaves | tensors)
        given |= {name: "a tensor" for name, leaf in leaves.items() if isinstance(leaf, Tensor)}
        if given != self._constants:
            name = next(name for name in given | self._constants if given.get(name) != self._constants.get(name))
            raise DispatchError(
                f"input {name!r} is {given.get(name, 'missing')}, but {self._constants.get(name, 'nothing')} was captured;"
                " compile again with it"
            )
        return tensors

    def _no_variant(self, tensors: Mapping[str, Tensor]) -> str:
        given = {name: _describe(tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
        compiled = [{name: _describe(shape, dtype) for name, shape, dtype in key} for key in self._variants]
        nearest = min(compiled, key=lambda facts: sum(facts[name] != given[name] for name in given))
        wrong = [f"{name} is {given[name]}, compiled {nearest[name]}" for name in given if given[name] != nearest[name]]
        return f"no engine for these inputs: {'; '.join(wrong)}; compile for this shape and dtype too"


def _key(facts: Any) -> Any:
    return tuple((name, tuple(shape), dtype) for name, shape, dtype in facts)


def _describe(shape: Sequence[int | None], dtype: torch.dtype) -> str:
    return f"{str(dtype).removeprefix('torch.')}{list(shape)}"
