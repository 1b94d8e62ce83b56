"""Plans: per budget, what each step runs, which history slot it writes, with which weights."""

from dataclasses import dataclass

from recache_compile.ir.forecasters import Forecaster
from recache_compile.ir.program import SitePattern, pattern_name
from recache_compile.ir.schedule import Schedule


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One denoising step.

    Args:
        pattern: per cache site, 0 for recompute or the number of anchors it is forecast from.
        slot: history slot that the features are written to; None on a cached step.
        coefficients: weight of every history slot, in slot order; empty on a recompute step.
    """

    pattern: SitePattern
    slot: int | None
    coefficients: tuple[float, ...]

    @property
    def program(self) -> str:
        """Name of the program that the step runs."""
        return pattern_name(self.pattern)


@dataclass(frozen=True, slots=True)
class Plan:
    """All steps of one generation under one schedule.

    Args:
        schedule: which of them are recomputed.
        steps: what each of them runs.
        forecaster: fills the cached ones.
    """

    schedule: Schedule
    steps: tuple[StepPlan, ...]
    forecaster: Forecaster

    def starting_at(self, step: int) -> "Plan":
        """The plan of generations that begin with a step, which is then recomputed."""
        if not step:
            return self
        return make_plan(self.schedule.starting_at(step), self.forecaster, len(self.steps[0].pattern), step)


def make_plan(schedule: Schedule, forecaster: Forecaster, num_sites: int, start: int = 0) -> Plan:
    """Write out a schedule: anchors go round a ring of `order + 1` slots.

    A cached step's weights are permuted here to slot order, so that nothing is moved or
    looked up in the loop.

    Args:
        schedule: counted from `start`.
        forecaster: fills the cached steps.
        num_sites: number of cache sites.
        start: step of the whole loop that the schedule begins with.
    """
    size = forecaster.order + 1
    steps: list[StepPlan] = []
    anchors: list[int] = []
    recompute = set(schedule.recompute_steps)
    for step in range(schedule.num_steps):
        if step in recompute:
            steps.append(StepPlan((0,) * num_sites, len(anchors) % size, ()))
            anchors.append(step)
            continue
        held = anchors[-size:]
        weights = forecaster.coefficients([anchor + start for anchor in held], step + start)
        by_slot = [0.0] * len(held)
        for age, weight in enumerate(weights):
            by_slot[(len(anchors) - 1 - age) % size] = weight
        steps.append(StepPlan((len(held),) * num_sites, None, tuple(by_slot)))
    return Plan(schedule, tuple(steps), forecaster)
