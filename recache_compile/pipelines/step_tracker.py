"""Which step of a pipeline's schedule a model call belongs to."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from recache_compile.errors import DispatchError, MismatchError


class StepTracker:
    """Knows the step of each call, and with which calls a generation begins.

    The step is what the pipeline tells, else what its scheduler says, else the place of the
    timestep in the scheduler's table; calls are never counted.

    Args:
        num_steps: length T of the denoising loop that was compiled.
        timesteps: names of the timestep inputs.
    """

    def __init__(self, num_steps: int, timesteps: Sequence[str]) -> None:
        self._num_steps = num_steps
        self._timesteps = tuple(timesteps)
        self._told: int | None = None
        self._last: int | None = None

    def restart(self) -> None:
        """The next call begins a generation, whatever its step."""
        self._last = None

    @contextlib.contextmanager
    def telling(self, step: int | None) -> Iterator[None]:
        """The step of the calls inside; None: the scheduler knows it."""
        before, self._told = self._told, step
        try:
            yield
        finally:
            self._told = before

    def advance(self, scheduler: Any, leaves: Mapping[str, Any]) -> tuple[int, bool]:
        """The step of a call, and whether a generation begins with it.

        One begins with the first call of all, the first one after `restart`, and with a call
        of an earlier step than the last one.

        Args:
            scheduler: of the pipeline, its timesteps set.
            leaves: of the call's arguments, by dotted name.

        Raises:
            MismatchError: the scheduler makes another number of steps than was compiled.
            DispatchError: the scheduler does not tell its step, and its table does not either.
        """
        step = self._step(scheduler, leaves)
        begins = self._last is None or step < self._last
        self._last = step
        return step, begins

    def _step(self, scheduler: Any, leaves: Mapping[str, Any]) -> int:
        steps, compiled = len(scheduler.timesteps), self._num_steps
        if steps != compiled:
            raise MismatchError(
                f"the pipeline runs {steps} steps, but {compiled} were compiled: {_remedy(scheduler, compiled)}"
            )
        if self._told is not None:
            return self._told
        if not hasattr(scheduler, "step_index"):
            return self._step_of_timestep(scheduler, leaves)
        if scheduler.step_index is not None:
            return int(scheduler.step_index)
        begin = getattr(scheduler, "begin_index", None)
        return min(self._places(scheduler, leaves), default=0) if begin is None else int(begin)

    def _step_of_timestep(self, scheduler: Any, leaves: Mapping[str, Any]) -> int:
        """Look the timestep up, for schedulers that do not tell their step."""
        found = self._places(scheduler, leaves)
        if len(found) != 1:
            raise DispatchError(
                f"{type(scheduler).__name__} does not tell its step, and the timestep is"
                f" {'at several places' if found else 'not'} in its table; use another scheduler"
            )
        return found.pop()

    def _places(self, scheduler: Any, leaves: Mapping[str, Any]) -> set[int]:
        """Where in the scheduler's table the timestep is."""
        table = scheduler.timesteps
        given = [leaves.get(name) for name in self._timesteps]
        return {
            int(at)
            for tensor in given
            if isinstance(tensor, Tensor)
            for at in (table == tensor.flatten()[0].to(table.device)).nonzero()
        }


def _remedy(scheduler: Any, compiled: int) -> str:
    """What to do where the number of steps is not the compiled one."""
    steps, asked = len(scheduler.timesteps), getattr(scheduler, "num_inference_steps", None)
    if asked in (None, steps):
        return f"pass num_inference_steps={compiled}, or compile with num_steps={steps}"
    return (
        f"{type(scheduler).__name__} makes {steps} of num_inference_steps={asked}; compile with num_steps={steps} and"
        f" call={{'num_inference_steps': {asked}}}, or use another scheduler"
    )
