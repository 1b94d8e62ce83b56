"""What one generation carries from call to call: a state of its own, however many run at the same time."""

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from recache_compile.pipelines.branches import Branches
from recache_compile.pipelines.step_tracker import StepTracker
from recache_compile.runtimes.dispatcher import Dispatcher


@dataclass(slots=True, eq=False)
class Generation:
    """One generation of a pipeline.

    Args:
        pipeline: for its scheduler.
        dispatcher: runs the steps; nobody else uses it meanwhile.
        steps: tells which step a call belongs to.
        in_call: whether an accelerated pipeline's call began it, and will end it.
        branches: the guidance branches that were met, where the pipeline does not name them.
        branch: the one that the pipeline has named.
        processors: the attention processors of its calls, by name.
        warned: whether the user was told that the original runs.
    """

    pipeline: Any
    dispatcher: Dispatcher
    steps: StepTracker
    in_call: bool
    processors: Mapping[str, Any] = field(default_factory=dict)
    branches: Branches = field(default_factory=Branches)
    branch: str | None = None
    warned: bool = False


class Generations:
    """The generations of one compiled transformer; each thread, and each call inside a call, has its own.

    Args:
        make_dispatcher: a new one for a budget.
    """

    _active: ContextVar[Mapping[int, Generation]] = ContextVar("generations", default={})  # noqa: B039 - never changed

    def __init__(self, make_dispatcher: Callable[[int], Dispatcher]) -> None:
        self._make = make_dispatcher
        self._free: dict[int, list[Dispatcher]] = {}
        self._own = threading.local()
        self._lock = threading.Lock()

    def lend(self, budget: int, dispatcher: Dispatcher) -> None:
        """Use this dispatcher for a budget, instead of a new one."""
        self._free.setdefault(budget, []).append(dispatcher)

    @contextlib.contextmanager
    def begin(self, pipeline: Any, budget: int, steps: StepTracker, processors: Mapping[str, Any]) -> Iterator[None]:
        """One call of a pipeline; its history is not kept when it is over.

        Raises:
            DispatchError: what was compared on the device turned out to differ.
        """
        with self._lock:
            free = self._free.setdefault(budget, [])
            dispatcher = free.pop() if free else None
        generation = Generation(pipeline, dispatcher or self._make(budget), steps, True, processors)
        token = self._active.set({**self._active.get(), id(self): generation})
        try:
            yield
            generation.dispatcher.finish()
        finally:
            self._active.reset(token)
            generation.dispatcher.reset(start=None)
            with self._lock:
                free.append(generation.dispatcher)

    def active(self) -> Generation | None:
        """The accelerated call that runs."""
        return self._active.get().get(id(self))

    def current(
        self, pipeline: Any, budget: int, make_steps: Callable[[], StepTracker], processors: Mapping[str, Any]
    ) -> Generation:
        """The generation that a call belongs to: the accelerated call that runs, or this thread's own loop."""
        if (active := self.active()) is not None:
            return active
        own: dict[int, Generation] = self._own.__dict__.setdefault("by_budget", {})
        if budget not in own or own[budget].pipeline is not pipeline:
            dispatcher = own[budget].dispatcher if budget in own else self._make(budget)
            own[budget] = Generation(pipeline, dispatcher, make_steps(), in_call=False)
        own[budget].processors = processors
        return own[budget]
