"""Plans: the ring, the warm-up and the permutation of the weights."""

from hypothesis import given
from hypothesis import strategies as st

from recache_compile.ir.forecasters import Newton, Taylor
from recache_compile.ir.plan import make_plan
from recache_compile.ir.schedule import Schedule

SCHEDULES = st.integers(1, 30).flatmap(
    lambda total: st.sets(st.integers(0, total - 1)).map(lambda steps: Schedule(tuple(steps | {0}), total))
)


@given(SCHEDULES, st.integers(0, 3))
def test_replaying_a_plan_gives_what_the_forecaster_says(schedule: Schedule, order: int) -> None:
    forecaster = Newton(order)
    ring: dict[int, int] = {}
    anchors: list[int] = []
    for step, plan in enumerate(make_plan(schedule, forecaster, 1).steps):
        if step in schedule.recompute_steps:
            assert plan.program == "recompute"
            assert plan.slot is not None
            ring[plan.slot] = step
            anchors.append(step)
        else:
            held = anchors[-(order + 1) :]
            assert plan.program == "forecast"
            expected = dict(zip(reversed(held), forecaster.coefficients(held, step), strict=True))
            assert {ring[slot]: weight for slot, weight in enumerate(plan.coefficients)} == expected


@given(SCHEDULES)
def test_one_step_plan_per_step_and_one_write_per_recompute_step(schedule: Schedule) -> None:
    steps = make_plan(schedule, Taylor(2), 1).steps
    assert len(steps) == schedule.num_steps
    assert [step for step, plan in enumerate(steps) if plan.slot is not None] == list(schedule.recompute_steps)


def test_every_site_has_an_entry() -> None:
    assert {len(step.pattern) for step in make_plan(Schedule((0, 2), 4), Taylor(1), 3).steps} == {3}
