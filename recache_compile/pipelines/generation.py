"""What one generation carries from call to call: a state of its own, however many run at the same time."""

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from recache_compile.ir.plan import Plan
from recache_compile.pipelines.branches import Branches
from recache_compile.pipelines.step_tracker import StepTracker
from recache_compile.runtimes.dispatcher import Dispatcher

IDLE = 4
"""Dispatchers that are kept for later generations; each holds tables of the prologue."""


@dataclass(slots=True, eq=False)
class Generation:
    """One generation of a pipeline.

    Args:
        pipeline: for its scheduler.
        budget: number of recompute steps, or a share of all steps.
        steps: tells which step a call belongs to.
        in_call: whether an accelerated pipeline's call began it, and will end it.
        dispatcher: runs the steps, from the first one on; nobody else uses it meanwhile.
        branches: the guidance branches that were met, where the pipeline does not name them.
        branch: the one that the pipeline has named.
        processors: the attention processors of its calls, by name.
        warned: whether the user was told that the original runs.
    """

    pipeline: Any
    budget: int | float
    steps: StepTracker
    in_call: bool
    processors: Mapping[str, Any] = field(default_factory=dict)
    dispatcher: Dispatcher | None = None
    branches: Branches = field(default_factory=Branches)
    branch: str | None = None
    warned: bool = False


class Generations:
    """The generations of one compiled transformer; each thread, and each call inside a call, has its own.

    Args:
        make_dispatcher: a new one for a plan.
    """

    _active: ContextVar[Mapping[int, Generation]] = ContextVar("generations", default={})  # noqa: B039 - never changed

    def __init__(self, make_dispatcher: Callable[[Plan], Dispatcher]) -> None:
        self._make = make_dispatcher
        self._idle: list[Dispatcher] = []
        self._own = threading.local()
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def begin(self, pipeline: Any, budget: float, steps: StepTracker, processors: Mapping[str, Any]) -> Iterator[None]:
        """One call of a pipeline; its history is not kept when it is over.

        Raises:
            DispatchError: what was compared on the device turned out to differ.
        """
        generation = Generation(pipeline, budget, steps, True, processors)
        token = self._active.set({**self._active.get(), id(self): generation})
        try:
            yield
            if generation.dispatcher is not None:
                generation.dispatcher.finish()
        finally:
            self._active.reset(token)
            self._return(generation)

    def follow(self, generation: Generation, plan: Plan) -> Dispatcher:
        """Let a generation follow a plan; it has its dispatcher until it follows another one, or is over."""
        if generation.dispatcher is None or generation.dispatcher.plan != plan:
            self._return(generation)
            with self._lock:
                at = next((at for at, each in enumerate(self._idle) if each.plan == plan), None)
                generation.dispatcher = None if at is None else self._idle.pop(at)
            generation.dispatcher = generation.dispatcher or self._make(plan)
        return generation.dispatcher

    def _return(self, generation: Generation) -> None:
        """What a generation has used, others may use."""
        dispatcher, generation.dispatcher = generation.dispatcher, None
        if dispatcher is not None:
            dispatcher.reset(start=None)
            with self._lock:
                self._idle = [dispatcher, *self._idle[: IDLE - 1]]

    def active(self) -> Generation | None:
        """The accelerated call that runs."""
        return self._active.get().get(id(self))

    def current(
        self, pipeline: Any, budget: float, make_steps: Callable[[], StepTracker], processors: Mapping[str, Any]
    ) -> Generation:
        """The generation that a call belongs to: the accelerated call that runs, or this thread's own loop."""
        if (active := self.active()) is not None:
            return active
        own: dict[tuple[bool, int | float], Generation] = self._own.__dict__.setdefault("by_budget", {})
        key = isinstance(budget, float), budget  # 1 is a step, 1.0 are all
        if key not in own or own[key].pipeline is not pipeline:
            dispatcher = own[key].dispatcher if key in own else None
            own[key] = Generation(pipeline, budget, make_steps(), in_call=False, dispatcher=dispatcher)
        own[key].processors = processors
        return own[key]
