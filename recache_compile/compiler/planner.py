"""Plans for any budget and any number of steps: those that were made beforehand, and others when they are asked for."""

import logging
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field

from recache_compile.errors import DispatchError, ScheduleError
from recache_compile.ir.carry_over import Levels, carry_over, interpolation
from recache_compile.ir.forecasters import Fitted, Forecaster
from recache_compile.ir.plan import Plan, make_plan
from recache_compile.ir.schedule import Schedule, budget_of
from recache_compile.policies.base import Calibration, Policy, Problem

log = logging.getLogger(__name__)

KEPT = 64
"""Plans of other loops that are remembered."""


@dataclass(frozen=True, slots=True, eq=False)
class Planner:
    """What knows a plan for every budget and every loop.

    Loops of another length: policies that look at nothing but the number of steps are asked
    for it.  All others are asked for the length that they were asked for first, and their
    recompute steps go to the nearest noise levels of the other loop.  The forecaster `fitted`
    is fitted to features that are interpolated between the noise levels of its calibration.
    A loop of the usual length has the usual schedule, whatever its noise levels.

    Args:
        plans: those that were made beforehand, by budget; all of one length.
        forecaster: fills the cached steps.
        num_sites: number of cache sites.
        levels: noise level of every step of their loop, where known; those of another loop are none.
        policy: asked for other budgets; None: there are none.
        calibration: of the model, for policies that look at one.
    """

    plans: Mapping[int, Plan]
    forecaster: Forecaster
    num_sites: int
    levels: tuple[float, ...] = ()
    policy: Policy | None = None
    calibration: Calibration | None = None
    _schedules: dict[int, Schedule] = field(default_factory=dict, init=False)
    _made: dict[tuple[int, int, tuple[float, ...]], Plan] = field(default_factory=dict, init=False)
    _making: threading.Lock = field(default_factory=threading.Lock, init=False)

    def __post_init__(self) -> None:
        if len(self.levels) != self.num_steps:
            object.__setattr__(self, "levels", ())

    @property
    def num_steps(self) -> int:
        """Length T of the loop that plans were made for beforehand."""
        return next(iter(self.plans.values())).schedule.num_steps

    def plan(self, budget: float, num_steps: int | None = None, levels: Levels = ()) -> Plan:
        """The plan of a loop.

        Args:
            budget: number of recompute steps k, or a share of the steps.
            num_steps: length of the loop; None: that of the plans which were made beforehand.
            levels: noise level of every step, where known; they count where the length is another.

        Raises:
            DispatchError: there is no such budget, or the policy has no answer for it.
        """
        steps = self.num_steps if num_steps is None else num_steps
        try:
            number = budget_of(budget, steps)
            if steps == self.num_steps and number in self.plans:
                return self.plans[number]
            key = (number, steps, () if steps == self.num_steps else tuple(levels))
            with self._making:
                if key not in self._made:
                    if len(self._made) >= KEPT:
                        del self._made[next(iter(self._made))]
                    log.info("choosing %d of %d steps", number, steps)
                    schedule = self._schedule(number, steps, levels)
                    self._made[key] = make_plan(schedule, self._forecaster(steps, levels), self.num_sites)
                self._made[key] = plan = self._made.pop(key)  # the longest unused goes first
                return plan
        except ScheduleError as error:
            raise DispatchError(str(error)) from error

    def check(self, budget: float) -> None:
        """Refuse a budget early, as far as that takes no search.

        Raises:
            DispatchError: there is no such budget, or none for the usual length.
        """
        if self.calibration is None:
            self.plan(budget)
        else:
            check_form(budget)

    def _schedule(self, budget: int, num_steps: int, levels: Levels) -> Schedule:
        if budget == num_steps:
            return Schedule.every(num_steps)
        if num_steps != self.num_steps and not getattr(self.policy, "for_any_length", False):
            base = self._answer(min(budget, self.num_steps))
            return carry_over(base, budget, num_steps, self.levels, levels)
        return self._answer(budget) if num_steps == self.num_steps else self._asked(budget, num_steps)

    def _answer(self, budget: int) -> Schedule:
        """The schedule of a budget, for the usual length."""
        if budget in self.plans:
            return self.plans[budget].schedule
        if budget not in self._schedules:
            self._schedules[budget] = self._asked(budget, self.num_steps)
        return self._schedules[budget]

    def _asked(self, budget: int, num_steps: int) -> Schedule:
        if budget == num_steps:
            return Schedule.every(num_steps)
        if self.policy is None:
            there = ", ".join(map(str, self.plans))
            raise DispatchError(f"budget {budget} was not compiled; there are {there}, whose schedules were given")
        return self.policy.schedule(Problem(num_steps, self.forecaster, self.calibration, levels=self.levels), budget)

    def _forecaster(self, num_steps: int, levels: Levels) -> Forecaster:
        """The forecaster for a loop."""
        if num_steps == self.num_steps or not isinstance(self.forecaster, Fitted):
            return self.forecaster
        return self.forecaster.interpolated(interpolation(self.num_steps, num_steps, self.levels, levels))


def check_form(budget: float) -> None:
    """Raise `DispatchError` unless it can be a budget, in whatever loop."""
    try:
        budget_of(budget, 1)
    except ScheduleError as error:
        raise DispatchError(str(error)) from error
