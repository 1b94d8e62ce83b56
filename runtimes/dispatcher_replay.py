"""A dispatcher for trying many schedules: what two generations have in common is computed once."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from typing_extensions import override

from recache_compile.errors import DispatchError
from recache_compile.ir.forecasters import Forecaster
from recache_compile.ir.plan import Plan, make_plan
from recache_compile.ir.schedule import Schedule
from recache_compile.ir.signature import Signature
from recache_compile.runtimes.base import Revision, Variant
from recache_compile.runtimes.dispatcher import Dispatcher, State
from recache_compile.runtimes.dispatcher_observer import Observer, StepRecord, StepRecorder, copy_of_result
from recache_compile.runtimes.dispatcher_tables import Tables


class ReplayDispatcher(Dispatcher):
    """Runs one generation after another under changing schedules.

    It holds the features of every recompute step of the last generation, k times what an
    anchor takes.

    Two generations of the same noise and conditioning are equal up to the first step in
    which their schedules differ: there the steps of the last generation are given again,
    without running an engine.  Schedules in lexicographic order of their masks share most.

    Args:
        forecaster: fills the cached steps.
        sites: number of cache sites.
        num_steps: length T of the denoising loop.
        variants, signature, revision: as of `Dispatcher`.
        observers: told of the steps that engines run, not of those that are given again.
    """

    def __init__(
        self,
        forecaster: Forecaster,
        sites: int,
        num_steps: int,
        variants: Sequence[Variant],
        signature: Signature,
        revision: Revision | None = None,
        observers: Sequence[Observer] = (),
    ) -> None:
        self._sites, self._forecaster = sites, forecaster
        every = make_plan(Schedule.every(num_steps), forecaster, sites)
        self._recorder = StepRecorder()
        super().__init__(every, variants, signature, revision, observers=(self._recorder, *observers))
        self._shared = 0
        self._weights_of_records = self._revision.number

    @property
    def records(self) -> Mapping[tuple[str, int], StepRecord]:
        """The steps of the last generation, by guidance branch and step."""
        return self._recorder.records

    def forget(self) -> None:
        """Let go of all records, which hold every feature of the recompute steps."""
        self._recorder.forget()

    def begin(self, schedule: Schedule, same: bool) -> None:
        """The next generation follows this schedule.

        Args:
            schedule: of the next generation.
            same: whether its noise and conditioning are those of the last one.  Nothing is
                shared with generations of older weights.
        """
        pairs = zip(self.plan.schedule.mask, schedule.mask, strict=True)
        shared = next((step for step, (before, now) in enumerate(pairs) if before != now), schedule.num_steps)
        self._shared = shared if same and self._weights_of_records == self._revision.number else 0
        self._weights_of_records = self._revision.number
        self._recorder.forget(self._shared)
        self.plan = make_plan(schedule, self._forecaster, self._sites)
        for state in self._states.values():
            state.forget()
            self._follow(state, self.plan.starting_at(state.start))

    @override
    def __call__(self, *, step: int, branch: str = "", **model_inputs: Any) -> Any:
        if step < self._shared and (branch, step) in self.records:
            return copy_of_result(self.records[branch, step].result)
        try:
            return super().__call__(step=step, branch=branch, **model_inputs)
        except DispatchError:  # such as that the timesteps of this generation were others: all of it is wrong
            self.forget()
            raise

    @override
    def _state(self, branch: str, step: int, model_inputs: Mapping[str, Any]) -> tuple[dict[str, Tensor], State]:
        tensors, state = super()._state(branch, step, model_inputs)
        if state.last_step is None and (branch, step - 1) in self.records:
            self._restore(state, branch, step)
        return tensors, state

    @override
    def _begins(self, branch: str, step: int) -> int:
        return min((at for name, at in self.records if name == branch), default=super()._begins(branch, step))

    @override
    def _new_tables(self, variant: Variant, plan: Plan, start: int) -> Tables:
        return Tables(variant, plan, start, self._revision, every=True)

    def _restore(self, state: State, branch: str, step: int) -> None:
        """Put a state where it was before `step`, its history included."""
        for at in range(state.start, step):
            for site, feature in self.records[branch, at].features.items():
                state.history[site, state.steps[at - state.start].slot] = feature
        state.last_step = step - 1
