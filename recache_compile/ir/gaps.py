"""Gaps: which cached steps have their predictions made by one call of the forecast program."""

from collections.abc import Mapping

from recache_compile.ir.plan import Plan
from recache_compile.ir.program import MIN_ROWS, Program

CALL_BYTES = 256 << 20
"""What the features of one call may take in float32, so that a long gap of a large model fits in memory."""


def steps_per_call(program: Program) -> int:
    """Most steps whose predictions one call of a forecast program makes; 1: it is called at every step."""
    if not program.serves_gaps:
        return 1
    features = sum(4 * value.nbytes // value.dtype.itemsize for value in program.inputs if value.slot == 0)
    predictions = sum(value.nbytes for value in program.outputs)
    return max(MIN_ROWS, CALL_BYTES // max(1, features, predictions))


def calls_of(plan: Plan, programs: Mapping[str, Program]) -> tuple[range, ...]:
    """The steps that have their results from the same engine call as each step, itself among them.

    They depend on the schedule alone, so that rounding does not depend on what ran before.

    Args:
        plan: what each step runs.
        programs: by name.
    """
    most = {name: steps_per_call(program) for name, program in programs.items() if name != "prologue"}
    names = [step.program for step in plan.steps]
    recompute = [step.slot is not None for step in plan.steps]
    calls: list[range] = []
    while len(calls) < len(names):
        begin = len(calls)
        end = begin + 1
        while not recompute[begin] and end < len(names) and not recompute[end] and end - begin < most[names[begin]]:
            end += 1
        calls += [range(begin, end)] * (end - begin)
    return tuple(calls)
