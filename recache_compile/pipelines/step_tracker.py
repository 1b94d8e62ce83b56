"""Which step of a pipeline's schedule a model call belongs to."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from recache_compile.errors import DispatchError
from recache_compile.runtimes.dispatcher_tables import Timetable

ELSEWHERE = (
    "this call comes from a loop that does not move the scheduler of the accelerated pipeline: another pipeline, or a"
    " loop of its own; rc.accelerate(...) the pipeline that is called, or step its scheduler"
)


class StepTracker:
    """Knows the step of each call, and with which calls a generation begins.

    The step is what the pipeline tells, else what its scheduler says, else the place of the
    timestep in the scheduler's table; calls are never counted.

    Args:
        timesteps: names of the timestep inputs.
    """

    def __init__(self, timesteps: Sequence[str]) -> None:
        self.num_steps = 0
        """Length of the loop that the last call belongs to."""
        self._timesteps = tuple(timesteps)
        self._told: int | None = None
        self._last: int | None = None
        self._first: dict[str, Tensor] = {}

    @contextlib.contextmanager
    def telling(self, step: int | None) -> Iterator[None]:
        """The step of the calls inside; None: the scheduler knows it."""
        before, self._told = self._told, step
        try:
            yield
        finally:
            self._told = before

    def advance(self, scheduler: Any, leaves: Mapping[str, Any], in_call: bool = True) -> tuple[int, bool]:
        """The step of a call, and whether a generation begins with it.

        One begins with the first call of all, with a call of an earlier step than the last one, and
        where the scheduler has another number of steps.

        Args:
            scheduler: of the pipeline, its timesteps set.
            leaves: of the call's arguments, by dotted name.
            in_call: whether it is known to be the scheduler of the pipeline that makes the call.

        Raises:
            DispatchError: the scheduler does not tell its step, and its table does not either.
        """
        length = loop_length(scheduler)
        step = self._step(scheduler, length, leaves, in_call)
        begins = self._last is None or step < self._last or length != self.num_steps
        self.num_steps = length
        if begins:
            self._first = {name: leaf.clone() for name, leaf in self._given(leaves).items()}
        self._last = step
        return step, begins

    def _step(self, scheduler: Any, length: int, leaves: Mapping[str, Any], in_call: bool) -> int:
        if self._told is not None:
            return self._told
        index = getattr(scheduler, "step_index", getattr(scheduler, "counter", None))
        if index is None:
            return self._first_or_found(scheduler, length, leaves)
        if not in_call:  # else the table is not looked at: on a GPU, reading a timestep would stall the loop
            places = self._places(scheduler, length, leaves)
            if index >= length or (places and index not in places):
                raise DispatchError(ELSEWHERE)
        return int(index)

    def _first_or_found(self, scheduler: Any, length: int, leaves: Mapping[str, Any]) -> int:
        """The step where the scheduler does not tell one: its first, or where the timestep is in its table."""
        begin = getattr(scheduler, "begin_index", None)
        if begin is not None and (self._last is None or self._is_first(leaves)):
            return int(begin)
        places = self._places(scheduler, length, leaves)
        if begin is not None and not places:
            return int(begin)
        if len(places) == 1:
            return places.copy().pop()
        if hasattr(scheduler, "step_index") and (self._last is None or self._is_first(leaves)):
            return min(places, default=0)
        raise DispatchError(
            f"{type(scheduler).__name__} does not tell its step, and the timestep is"
            f" {'at several places' if places else 'not'} in its table; use another scheduler, step it in the loop, or"
            " name the step with transformer.cache_context(NAME, step_index=...)"
        )

    def _given(self, leaves: Mapping[str, Any]) -> dict[str, Tensor]:
        """The timestep inputs of a call."""
        found = {name: leaves.get(name) for name in self._timesteps}
        return {name: leaf for name, leaf in found.items() if isinstance(leaf, Tensor) and leaf.numel()}

    def _is_first(self, leaves: Mapping[str, Any]) -> bool:
        """Whether a call has the timesteps that its generation began with: another branch of the first step."""
        given = self._given(leaves)
        return (
            bool(given)
            and given.keys() == self._first.keys()
            and all(
                tensor.shape == self._first[name].shape and torch.equal(tensor, self._first[name])
                for name, tensor in given.items()
            )
        )

    def _places(self, scheduler: Any, length: int, leaves: Mapping[str, Any]) -> set[int]:
        """Where in the scheduler's table the timestep is, as it is or in units of the training's steps.

        Tokens may have timesteps of their own: those of frames that are given are smaller, so
        the largest is the loop's.
        """
        values = [tensor.max() for tensor in self._given(leaves).values()]
        if not values:
            return set()
        table = Timetable.of(scheduler, length)
        for value in values:
            for scaled in table.scaled(value):
                near = torch.isclose(scaled.double(), value.double().cpu(), rtol=1e-5, atol=0.0)
                if found := {int(at) for at in near.nonzero()}:
                    return found
        return set()


def loop_length(scheduler: Any) -> int:
    """The number of steps T of the loop that a scheduler's timesteps are set for.

    Some schedulers make more than they are asked for (Heun's nearly twice as many).
    """
    steps = len(scheduler.timesteps)
    is_spare = getattr(scheduler, "num_inference_steps", None) == steps - 1 and has_spare_timestep(scheduler)
    return steps - 1 if is_spare else steps


def has_spare_timestep(scheduler: Any) -> bool:
    """Whether a scheduler's table ends with a timestep of zero, where nothing is left to denoise (`SCMScheduler`)."""
    return bool(scheduler.timesteps[-1] == 0)


def remedy_for_length(scheduler: Any, compiled: int) -> str:
    """What is wrong, and what to do, where the number of steps is not the compiled one."""
    steps, asked = len(scheduler.timesteps), getattr(scheduler, "num_inference_steps", None)
    wrong = f"the pipeline runs {steps} steps, but {compiled} were compiled"
    if asked in (None, steps):
        return f"{wrong}: pass num_inference_steps={compiled}, or compile with num_steps={steps}"
    return (
        f"{wrong}: {type(scheduler).__name__} makes {steps} of num_inference_steps={asked}; compile with"
        f" num_steps={steps} and call={{'num_inference_steps': {asked}}}, or use another scheduler"
    )
