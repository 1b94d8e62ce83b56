"""Which cached steps share one engine call."""

from dataclasses import replace

import pytest

import recache_compile as rc
from recache_compile.ir import gaps
from recache_compile.ir.forecasters import Taylor
from recache_compile.ir.gaps import calls_of, steps_per_call
from recache_compile.ir.plan import make_plan
from recache_compile.ir.schedule import Schedule

FEATURE_BYTES = 16 * 32 * 4


@pytest.mark.parametrize(
    ("most", "expected"),
    [
        (100, [(0, 1), (1, 6), (6, 7), (7, 8), (8, 9)]),
        (3, [(0, 1), (1, 4), (4, 6), (6, 7), (7, 8), (8, 9)]),
        (0, [(0, 1), (1, 3), (3, 5), (5, 6), (6, 7), (7, 8), (8, 9)]),
    ],
)
def test_a_gap_is_cut_into_calls_of_bounded_size(
    most: int, expected: list[tuple[int, int]], eager: rc.Compiled, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A call makes two rows at least, as tables do."""
    monkeypatch.setattr(gaps, "CALL_BYTES", most * FEATURE_BYTES)
    plan = make_plan(Schedule((0, 6, 7), 9), Taylor(1), 1)
    calls = calls_of(plan, eager.variants[0].programs)
    assert [step in call for step, call in enumerate(calls)] == [True] * 9
    assert sorted({(call.start, call.stop) for call in calls}) == expected


def test_a_program_of_single_steps_is_called_at_every_step(eager: rc.Compiled) -> None:
    programs = dict(eager.variants[0].programs)
    single = replace(programs["recompute"], name="forecast")
    assert steps_per_call(single) == 1
    plan = make_plan(Schedule((0,), 4), Taylor(1), 1)
    assert [len(call) for call in calls_of(plan, {**programs, "forecast": single})] == [1] * 4
