"""The denoising loop's side of a compiled model: one engine call per recompute step and gap."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from recache_compile.errors import DispatchError, MismatchError
from recache_compile.ir.gaps import calls_of
from recache_compile.ir.plan import Plan, StepPlan
from recache_compile.ir.program import MIN_ROWS
from recache_compile.ir.signature import Signature
from recache_compile.ir.value import Kind, Value
from recache_compile.runtimes._known_calls import KnownCalls
from recache_compile.runtimes._tensor_snapshot import TensorSnapshot
from recache_compile.runtimes.base import Revision, Variant
from recache_compile.runtimes.dispatcher_observer import Observer, StepRecord
from recache_compile.runtimes.dispatcher_tables import Tables, Timetable
from recache_compile.support.devices import on_device

MAX_SIZES = 4
"""Sizes that a branch keeps tables and history for, where sizes are free."""

Site = int | None
Place = tuple[str, Hashable, int]
"""Guidance branch, kind of its calls, number of the variant among those of this kind."""


@dataclass(slots=True)
class State:
    """What one guidance branch at one shape carries from step to step.

    Args:
        place: which branch and calls these are.
        variant: its programs and engines.
        values: what its programs read and return, by name.
        gap_programs: names of those that make the predictions of several steps in one call.
        steps: the plan of the steps from `start` on.
        start: the step its generations begin with.
        calls: the steps that have their predictions from the same engine call as each step.
        coefficients: of every step in `steps` (steps + 1, h), on the device; zero where an anchor is missing.
        tables: the prologue's results; None when nothing was hoisted.
        fixed: the inputs that must have the values of the capture.
        revision: of the weights that predictions were made with.
        history: features by site and slot.
        ahead: predictions that were made for later steps of a gap.
        last_step: the last step that succeeded; None before the first one.
    """

    place: Place
    variant: Variant
    values: Mapping[str, tuple[tuple[Value, ...], tuple[Value, ...]]]
    gap_programs: frozenset[str]
    steps: tuple[StepPlan, ...]
    start: int
    calls: tuple[range, ...]
    coefficients: Tensor
    tables: Tables | None
    fixed: Mapping[str, TensorSnapshot]
    revision: int
    history: dict[tuple[Site, int | None], Tensor] = field(default_factory=dict)
    ahead: dict[int, list[Tensor]] = field(default_factory=dict)
    last_step: int | None = None

    @property
    def is_idle(self) -> bool:
        """Whether no generation is in progress."""
        return self.last_step in (None, self.start + len(self.steps) - 1)

    def forget(self) -> None:
        """Forget the generation in progress."""
        self.history.clear()
        self.ahead.clear()
        self.last_step = None


class Dispatcher:
    """The same model call, step by step, under one budget.

    Calls are `run(step=i, **model_inputs)` and return what the module returns with
    `return_dict=False`.  Steps run in order; the first one starts a new generation.
    Guidance branches and input shapes each have a state of their own.

    Args:
        plan: what each step runs.
        variants: programs and engines, one for each kind of calls.
        signature: how the model is called.
        revision: counts the changes of the weights.
        observers: told of each step once it has succeeded, in this order.
    """

    def __init__(
        self,
        plan: Plan,
        variants: Sequence[Variant],
        signature: Signature,
        revision: Revision | None = None,
        observers: Sequence[Observer] = (),
    ) -> None:
        self.plan = plan
        self._revision = revision or Revision()
        self._observers = tuple(observers)
        self._result = result_maker(signature)
        self._calls = KnownCalls(variants, signature)
        self._device = variants[0].device
        self._start: int | None = 0
        self._timetable: Timetable | None = None
        self._states: dict[Place, State] = {}

    def reset(self, start: int | None = 0, timetable: Timetable | None = None) -> None:
        """Forget every generation in progress and its history.

        Args:
            start: the step that the next generations begin with.  It is then a recompute
                step, in addition to those that come after it (image-to-image runs begin in
                the middle of the schedule).  None: each branch and kind of call begins with
                the step that it is first called in.
            timetable: of the loop's scheduler: where it is not the one that was compiled, this is then
                known from the first step on.  On a GPU it is otherwise noticed after the last one.

        Raises:
            DispatchError: there is no such step.
        """
        if start is not None and not 0 <= start < len(self.plan.steps):
            raise DispatchError(f"start {start}: expected 0..{len(self.plan.steps) - 1}")
        self._start, self._timetable = start, timetable
        for state in self._states.values():
            state.forget()

    def finish(self) -> None:
        """A generation is over, whichever step was its last.

        Raises:
            DispatchError: what was compared on the device turned out to differ, so its result is wrong.
        """
        for state in self._states.values():
            if state.tables is not None:
                state.tables.finish()

    def __call__(self, *, step: int, branch: str = "", **model_inputs: Any) -> Any:
        """One model call of one denoising step.

        Args:
            step: index i of the step, 0..T-1.
            branch: name of the guidance branch ("cond", "uncond"), where there are several.
            model_inputs: the module's arguments.

        Raises:
            MismatchError: the inputs are not of a kind that was compiled.
            DispatchError: the step does not follow the last one.
        """
        if not 0 <= step < len(self.plan.steps):
            raise DispatchError(f"step {step}: expected 0..{len(self.plan.steps) - 1}")
        tensors, state = self._state(branch, step, model_inputs)
        if step not in (state.start, None if state.last_step is None else state.last_step + 1):
            raise DispatchError(
                f"step {step} does not follow step {state.last_step}: run the steps in order, or start again at step"
                f" {state.start}"
            )
        state.last_step = None  # until this step has succeeded
        at = step - state.start
        with on_device(self._device):
            if at == 0 or state.revision != self._revision.number:
                state.ahead.clear()
                state.revision = self._revision.number
            if state.tables is not None:
                if at == 0:
                    state.tables.restart(self._timetable)
                if not state.tables.prepare(at, tensors):
                    state.ahead.clear()
            predictions, stored = self._run(state, at, tensors)
        state.last_step = step
        if state.tables is not None and at == len(state.steps) - 1:
            state.tables.finish()
        result = self._result(predictions)
        if self._observers:
            self._tell(state, tensors, stored, result)
        return result

    def _run(self, state: State, at: int, tensors: Mapping[str, Tensor]) -> tuple[list[Tensor], dict[Site, Tensor]]:
        """Run the program of a step: its predictions, and the features that were stored in the step's slot."""
        if at in state.ahead:
            return state.ahead.pop(at), {}
        this = state.steps[at]
        name = this.program
        if name in state.gap_programs:
            self._run_ahead(state, at, tensors)
            return state.ahead.pop(at), {}
        inputs, outputs = state.values[name]
        results = state.variant.engines[name]([self._argument(state, value, at, tensors) for value in inputs])
        predictions: list[Tensor] = []
        stored: dict[Site, Tensor] = {}
        for value, result in zip(outputs, results, strict=True):
            if value.kind is not Kind.FEATURE:
                predictions.append(result)
                continue
            stored[value.site] = state.history[value.site, this.slot] = result
        return predictions, stored

    def _run_ahead(self, state: State, at: int, tensors: Mapping[str, Tensor]) -> None:
        """Make the predictions of a cached step and of those that are made with it.

        Where the rows of one of them are not known yet, they are made one by one.
        """
        steps = state.calls[at]
        if state.tables is not None and not all(map(state.tables.has_rows, steps)):
            steps = range(at, at + 1)
        padded = [*steps, *[at] * (MIN_ROWS - len(steps))]
        name = state.steps[at].program
        arguments = []
        for value in state.values[name][0]:
            if value.kind is Kind.COEFFICIENTS:
                arguments.append(state.coefficients[steps.start : steps.start + len(padded)])
            elif value.kind is Kind.TABLE_ROW:
                assert state.tables is not None
                arguments.append(torch.stack([state.tables.read(value, step) for step in padded]))
            else:
                arguments.append(self._argument(state, value, at, tensors))
        results = state.variant.engines[name](arguments)
        state.ahead = {step: [result[number] for result in results] for number, step in enumerate(steps) if step >= at}

    def _tell(self, state: State, tensors: Mapping[str, Tensor], stored: Mapping[Site, Tensor], result: Any) -> None:
        """Tell the observers of the step that has succeeded last."""
        assert state.last_step is not None
        branch, *kind = state.place
        record = StepRecord(
            step=state.last_step,
            branch=branch,
            kind=tuple(kind),
            first=state.last_step == state.start,
            latents=tuple(tensors[name] for name in state.variant.names(Kind.LATENTS)),
            result=result,
            slot=state.steps[state.last_step - state.start].slot,
            features=stored,
        )
        for observer in self._observers:
            observer.after_step(record)

    def _argument(self, state: State, value: Value, at: int, tensors: Mapping[str, Tensor]) -> Tensor:
        if value.kind is Kind.HISTORY:
            held = state.history.get((value.site, value.slot))
            return state.history[value.site, 0] if held is None else held  # a missing anchor has weight zero
        if value.kind is Kind.COEFFICIENTS:
            return state.coefficients[at]
        if value.kind in (Kind.TABLE_ROW, Kind.FIXED):
            assert state.tables is not None
            return state.tables.read(value, at)
        return tensors[value.name].contiguous()

    def _state(self, branch: str, step: int, model_inputs: Mapping[str, Any]) -> tuple[dict[str, Tensor], State]:
        """The tensor inputs by name, and the state of their branch and kind, which may begin with this step."""
        if torch.is_autocast_enabled(self._device.type):
            raise DispatchError(
                "torch.autocast is on, which engines do not follow; call them outside of it, and compile the model in"
                " bfloat16 or float16 for half precision"
            )
        tensors, key = self._calls.look_at(branch, model_inputs)
        number = self._matching(self._calls.variants(key), tensors, branch, key)
        place = branch, key, number
        state, start = self._states.get(place), self._begins(branch, step)
        if state is not None and state.last_step is None and len(self._states) > MAX_SIZES:
            self._states[place] = self._states.pop(place)  # used last
        if state is None or (state.last_step is None and state.start != start) or self._comes_back(state, step):
            state = self._new_state(place, start)
            self._make_room(place, state.variant)
            self._states[place] = state
        return tensors, state

    def _make_room(self, place: Place, variant: Variant) -> None:
        """Forget the oldest states of other sizes whose generations are over: there may be any number of sizes."""
        if not variant.has_free_sizes:
            return
        branch, key, _ = place
        others = [
            other
            for other, state in self._states.items()
            if state.variant is variant and other[0] == branch and other[1] != key
        ]
        for other in others[: max(0, len(others) - MAX_SIZES + 1)]:
            if self._states[other].is_idle:
                del self._states[other]

    def _comes_back(self, state: State, step: int) -> bool:
        """Whether a branch was left out for some steps: it then begins anew, and recomputes, where it comes back."""
        return self._start is None and state.last_step is not None and step > state.last_step + 1

    def _begins(self, branch: str, step: int) -> int:
        """The first step of a generation of this branch that is called in `step`."""
        return step if self._start is None else self._start

    def _matching(self, variants: Sequence[Variant], tensors: Mapping[str, Tensor], branch: str, key: Hashable) -> int:
        """Number of the variant that was compiled for the values of these tensors."""
        for number, variant in enumerate(variants):
            state = self._states.get((branch, key, number))
            fixed = (
                {name: TensorSnapshot.of(value) for name, value in variant.fixed.items()}
                if state is None
                else state.fixed
            )
            if all(value.still_equals(tensors[name]) for name, value in fixed.items()):
                return number
        raise MismatchError(
            f"the values of {', '.join(map(repr, variants[0].fixed))} are not those compiled, and the model's code"
            " decides by them; compile for them too"
        )

    def _new_state(self, place: Place, start: int) -> State:
        """A state for generations that begin with a step."""
        _, key, number = place
        variant, plan = self._calls.variants(key)[number], self.plan.starting_at(start)
        tables = self._new_tables(variant, plan, start) if "prologue" in variant.programs else None
        fixed = {name: TensorSnapshot.of(value) for name, value in variant.fixed.items()}
        values = {name: (program.inputs, program.outputs) for name, program in variant.programs.items()}
        serving = frozenset(name for name, program in variant.programs.items() if program.serves_gaps)
        return State(
            place=place,
            variant=variant,
            values=values,
            gap_programs=serving,
            steps=plan.steps,
            start=start,
            calls=calls_of(plan, variant.programs),
            coefficients=self._coefficients(plan, variant),
            tables=tables,
            fixed=fixed,
            revision=self._revision.number,
        )

    def _follow(self, state: State, plan: Plan) -> None:
        """Let a state follow another plan with the same first step."""
        state.steps = plan.steps
        state.calls = calls_of(plan, state.variant.programs)
        state.coefficients = self._coefficients(plan, state.variant)
        if state.tables is not None:
            state.tables.follow(plan)

    def _new_tables(self, variant: Variant, plan: Plan, start: int) -> Tables:
        return Tables(variant, plan, start, self._revision)

    def _coefficients(self, plan: Plan, variant: Variant) -> Tensor:
        """Those of every step, and as many rows of zeros as make a call of the last step a full one."""
        anchors = max(program.num_anchors for program in variant.programs.values())
        rows = [(*step.coefficients, *[0.0] * (anchors - len(step.coefficients))) for step in plan.steps]
        rows += [(0.0,) * anchors] * (MIN_ROWS - 1)
        return torch.tensor(rows, dtype=torch.float32, device=self._device)


def result_maker(signature: Signature) -> Callable[[Sequence[Tensor]], Any]:
    """What makes a model's result of its tensors."""
    structure = pytree.treespec_loads(signature.result)
    numbers = list(range(len(signature.tensors)))
    if all(signature.tensors) and pytree.tree_unflatten(numbers, structure) == tuple(numbers):
        return tuple

    def result(predictions: Sequence[Tensor]) -> Any:
        left = iter(predictions)
        leaves = [next(left) if is_tensor else None for is_tensor in signature.tensors]
        return pytree.tree_unflatten(leaves, structure)

    return result
