"""A dispatcher for trying many schedules: what two generations have in common is computed once."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from recache_compile.errors import DispatchError
from recache_compile.ir.forecasters import Forecaster
from recache_compile.ir.plan import Plan, make_plan
from recache_compile.ir.schedule import Schedule
from recache_compile.ir.signature import Signature
from recache_compile.ir.value import Kind
from recache_compile.runtimes.base import Revision, Variant
from recache_compile.runtimes.dispatcher import Dispatcher, State
from recache_compile.runtimes.dispatcher_tables import Tables


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One step of one guidance branch, as it was run.

    Args:
        latents: the model's latents inputs.
        result: what the model call returned.
        features: by cache site, where the step was recomputed.
    """

    latents: tuple[Tensor, ...]
    result: Any
    features: Mapping[int | None, Tensor] = field(default_factory=dict)


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
    """

    def __init__(
        self,
        forecaster: Forecaster,
        sites: int,
        num_steps: int,
        variants: Sequence[Variant],
        signature: Signature,
        revision: Revision | None = None,
    ) -> None:
        self._sites = sites
        every = make_plan(Schedule.every(num_steps), forecaster, sites)
        super().__init__(every, forecaster, variants, signature, revision)
        self.records: dict[tuple[str, int], StepRecord] = {}
        self._shared = 0
        self._weights_of_moments = self._revision.number

    def begin(self, schedule: Schedule, same: bool) -> None:
        """The next generation follows this schedule.

        Args:
            schedule: of the next generation.
            same: whether its noise and conditioning are those of the last one.  Nothing is
                shared with generations of older weights.
        """
        pairs = zip(self.plan.schedule.mask, schedule.mask, strict=True)
        shared = next((step for step, (before, now) in enumerate(pairs) if before != now), schedule.num_steps)
        self._shared = shared if same and self._weights_of_moments == self._revision.number else 0
        self._weights_of_moments = self._revision.number
        self.records = {place: each for place, each in self.records.items() if place[1] < self._shared}
        self.plan = make_plan(schedule, self._forecaster, self._sites)
        for state in self._states.values():
            state.history.clear()
            state.last_step = None
            rest = self._rest(state.start)
            state.steps, state.coefficients = rest.steps, self._coefficients(rest)
            if state.tables is not None:
                state.tables.follow(rest)

    def __call__(self, *, step: int, branch: str = "", **model_inputs: Any) -> Any:
        """One model call, or its result from the last generation; see `Dispatcher`."""
        if step < self._shared and (branch, step) in self.records:
            return _copy(self.records[branch, step].result)
        tensors, state = self._state(branch, step, model_inputs)
        if state.last_step is None and (branch, step - 1) in self.records:
            self._restore(state, branch, step)
        try:
            result = super().__call__(step=step, branch=branch, **model_inputs)
        except DispatchError:  # such as that the timesteps of this generation were others: all of it is wrong
            self.records.clear()
            raise
        slot = state.steps[step - state.start].slot
        features = {} if slot is None else {site: each for (site, at), each in state.history.items() if at == slot}
        latents = tuple(tensors[name].clone() for name in state.variant.names(Kind.LATENTS))
        self.records[branch, step] = StepRecord(latents, _copy(result), features)
        return result

    def _begins(self, branch: str, step: int) -> int:
        return min((at for name, at in self.records if name == branch), default=super()._begins(branch, step))

    def _new_tables(self, variant: Variant, plan: Plan, start: int) -> Tables:
        return Tables(variant, plan, start, self._revision, every=True)

    def _restore(self, state: State, branch: str, step: int) -> None:
        """Put a state where it was before `step`, its history included."""
        for at in range(state.start, step):
            for site, feature in self.records[branch, at].features.items():
                state.history[site, state.steps[at - state.start].slot] = feature
        state.last_step = step - 1


def _copy(result: Any) -> Any:
    """The same result in memory of its own: callers may write to theirs."""
    return pytree.tree_map_only(Tensor, Tensor.clone, result)
