"""Observed generations: what is told is what was run, and the changes are those of the original's blocks."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typing_extensions import override

import recache_compile as rc
from recache_compile.errors import DispatchError
from recache_compile.ir.plan import make_plan
from recache_compile.ir.schedule import Schedule
from recache_compile.runtimes.dispatcher import Dispatcher
from recache_compile.runtimes.dispatcher_observer import FeatureChanges, Observer, StepRecord, StepRecorder
from tests.conftest import NUM_STEPS, compile_flux, flux_inputs, loop_inputs
from tests.runtimes.test_cuda_graphs import graphed

INPUTS = flux_inputs(seed=3)
EVERY = Schedule.every(NUM_STEPS)
SOME = Schedule((0, 1, 4, 8), NUM_STEPS)


class Told(Observer):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.records: list[StepRecord] = []

    @override
    def after_step(self, record: StepRecord) -> None:
        self.records.append(record)


@pytest.fixture(scope="module")
def compiled(flux: nn.Module) -> rc.Compiled:
    return compile_flux(flux, granularity="block", residual=False, hoist=False)


def observed(compiled: rc.Compiled, *observers: Observer, schedule: Schedule = EVERY) -> Dispatcher:
    sites = len(next(iter(compiled.plans.values())).steps[0].pattern)
    plan = make_plan(schedule, compiled.forecaster, sites)
    return Dispatcher(plan, compiled.variants, compiled.engines.signature, observers=observers)


def run(dispatcher: Dispatcher, start: int = 0, stop: int = NUM_STEPS, branch: str = "") -> list[Tensor]:
    dispatcher.reset(start)
    return [dispatcher(step=step, branch=branch, **loop_inputs(step, INPUTS))[0] for step in range(start, stop)]


def changes_of(compiled: rc.Compiled, start: int = 0) -> list[list[float | None]]:
    changes = FeatureChanges(NUM_STEPS)
    run(observed(compiled, changes), start)
    return changes.changes()


def test_changes_are_those_of_what_the_blocks_return(compiled: rc.Compiled, flux: nn.Module) -> None:
    seen: dict[tuple[str, int], list[Tensor]] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, result: Any) -> None:
            for place, each in enumerate(result if isinstance(result, tuple) else (result,)):
                seen.setdefault((name, place), []).append(each.clone())

        return hook

    blocks = {
        name: each
        for name, each in flux.named_modules()
        if name.rpartition(".")[0] in ("transformer_blocks", "single_transformer_blocks")
    }
    handles = [block.register_forward_hook(keep(name)) for name, block in blocks.items()]
    for step in range(NUM_STEPS):
        flux(**loop_inputs(step, INPUTS), return_dict=False)
    for handle in handles:
        handle.remove()
    expected = torch.tensor([
        float((now - past).abs().mean() / past.abs().mean()) for values in seen.values() for past, now in pairwise(values)
    ])  # fmt: skip
    found = changes_of(compiled)
    assert len(found) >= len(blocks)
    assert all(row[0] is None and None not in row[1:] for row in found)
    assert all((expected - value).abs().min() < 1e-5 for row in found for value in row if value is not None)


def test_steps_that_are_not_run_are_left_open(compiled: rc.Compiled) -> None:
    rows = changes_of(compiled, start=4)
    assert all(row[:5] == [None] * 5 and None not in row[5:] for row in rows)


def test_results_are_those_of_the_original(compiled: rc.Compiled, flux: nn.Module) -> None:
    (found,) = run(observed(compiled, FeatureChanges(NUM_STEPS)), stop=1)
    (expected,) = flux(**loop_inputs(0, INPUTS), return_dict=False)
    torch.testing.assert_close(found, expected)


def test_a_generation_is_not_compared_with_an_interrupted_one(compiled: rc.Compiled) -> None:
    changes = FeatureChanges(NUM_STEPS)
    dispatcher = observed(compiled, changes)
    run(dispatcher, stop=4)
    run(dispatcher, start=4)
    assert all(row[4] is None and None not in row[5:] for row in changes.changes())


def test_forecast_steps_are_not_compared(compiled: rc.Compiled) -> None:
    changes = FeatureChanges(NUM_STEPS)
    run(observed(compiled, changes, schedule=SOME))
    for row in changes.changes():
        assert [step for step, change in enumerate(row) if change is not None] == [1]


def test_branches_are_compared_apart_and_averaged(compiled: rc.Compiled) -> None:
    both, alone = FeatureChanges(NUM_STEPS), [FeatureChanges(NUM_STEPS), FeatureChanges(NUM_STEPS)]
    inputs = [flux_inputs(seed=3), flux_inputs(seed=4)]
    together = observed(compiled, both)
    apart = [observed(compiled, each) for each in alone]
    for step in range(NUM_STEPS):
        for number in range(2):
            together(step=step, branch=str(number), **loop_inputs(step, inputs[number]))
            apart[number](step=step, **loop_inputs(step, inputs[number]))
    first, second = (torch.tensor([row[1:] for row in each.changes()]) for each in alone)
    assert not torch.allclose(first, second)
    torch.testing.assert_close(torch.tensor([row[1:] for row in both.changes()]), (first + second) / 2)


def test_observers_are_told_of_every_step_in_order(compiled: rc.Compiled) -> None:
    told, other = Told(), Told()
    results = run(observed(compiled, told, other, schedule=SOME), branch="cond")
    assert told.records == other.records
    assert [record.step for record in told.records] == list(range(NUM_STEPS))
    assert [record.first for record in told.records] == [True] + [False] * (NUM_STEPS - 1)
    assert {record.branch for record in told.records} == {"cond"}
    assert len({record.kind for record in told.records}) == 1
    for record, result in zip(told.records, results, strict=True):
        assert record.result[0] is result
        assert torch.equal(record.latents[0], loop_inputs(record.step, INPUTS)["hidden_states"])
    stored = {record.step: record.slot for record in told.records if record.features}
    assert stored == {0: 0, 1: 1, 4: 0, 8: 1}
    assert all(record.slot is None for record in told.records if not record.features)


def test_a_step_that_fails_is_not_told(compiled: rc.Compiled) -> None:
    told = Told()
    dispatcher = observed(compiled, told)
    run(dispatcher, stop=1)
    with pytest.raises(DispatchError, match="does not follow"):
        dispatcher(step=2, **loop_inputs(2, INPUTS))
    assert [record.step for record in told.records] == [0]


def test_what_cuda_graphs_store_stays_as_it_was_told(compiled: rc.Compiled) -> None:
    plain, replayed = Told(), Told()
    run(observed(compiled, plain))
    run(observed(graphed(compiled), replayed))
    for ours, theirs in zip(replayed.records, plain.records, strict=True):
        assert ours.features.keys() == theirs.features.keys()
        assert all(torch.equal(ours.features[site], theirs.features[site]) for site in ours.features)


def test_a_recorder_keeps_copies_of_the_last_generation(compiled: rc.Compiled) -> None:
    kept = StepRecorder()
    dispatcher = observed(compiled, kept)
    for _ in range(2):
        for result in run(dispatcher):
            result.zero_()
    assert sorted(kept.records) == [("", step) for step in range(NUM_STEPS)]
    assert all(record.result[0].any() for record in kept.records.values())
    kept.forget(2)
    assert sorted(kept.records) == [("", 0), ("", 1)]
    kept.forget()
    assert not kept.records
