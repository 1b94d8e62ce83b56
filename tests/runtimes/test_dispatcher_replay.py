"""Generations under changing schedules: equal to fresh ones, and nothing is computed twice."""

import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import recache_compile as rc
from recache_compile.errors import DispatchError, MismatchError
from recache_compile.ir.forecasters import get_forecaster
from recache_compile.ir.schedule import Schedule
from recache_compile.policies.moves import random_schedule
from recache_compile.runtimes.dispatcher_observer import FeatureChanges, Observer, StepRecorder
from recache_compile.runtimes.dispatcher_replay import ReplayDispatcher
from recache_compile.runtimes.dispatcher_tables import Tables
from tests.compiler.test_build import counted, relative_error
from tests.conftest import NUM_STEPS, flux_inputs, timesteps, tiny_flux

ONE = {"": flux_inputs(seed=1)}
TWO = {"cond": flux_inputs(seed=1), "uncond": flux_inputs(seed=2)}
FULL = Schedule.every(NUM_STEPS)


def schedules(count: int, seed: int = 0) -> list[Schedule]:
    """Random schedules of budgets 2..6; some come twice, some differ in their last steps only."""
    random = np.random.default_rng(seed)
    drawn = [random_schedule(NUM_STEPS, int(random.integers(2, 7)), random) for _ in range(count - 2)]
    late = Schedule((*drawn[0].recompute_steps[:-1], NUM_STEPS - 1), NUM_STEPS)
    assert late not in drawn
    return [*drawn, drawn[0], late]


def generation(
    run: Any, inputs: dict[str, dict[str, Tensor]], start: int = 0, late: int = 0, begins: bool = True
) -> list[Tensor]:
    """All results of one generation, whose latents depend on every one before.

    Args:
        run: a dispatcher.
        inputs: of each guidance branch; the noise is that of the first.
        start: first step.
        late: first step of the branches but the first.
        begins: whether this is a new generation for the dispatcher.
    """
    if begins:
        run.reset(start=None)
    latents, results = next(iter(inputs.values()))["hidden_states"], []
    for step in range(start, NUM_STEPS):
        called = {
            name: run(step=step, branch=name, **each | {"hidden_states": latents, "timestep": timesteps()[step]})[0]
            for number, (name, each) in enumerate(inputs.items())
            if number == 0 or step >= late
        }
        results += called.values()
        latents = latents - 0.1 * sum(called.values())
    return results


def replayed(run: ReplayDispatcher, schedule: Schedule, same: bool, inputs: Any = ONE, **options: Any) -> list[Tensor]:
    run.begin(schedule, same)
    return generation(run, inputs, **options)


def fresh(compiled: rc.Compiled, schedule: Schedule, inputs: Any = ONE, **options: Any) -> list[Tensor]:
    """The same generation by an ordinary dispatcher that has run nothing else."""
    run = compiled.engines.with_plans({schedule.budget: schedule}, compiled.forecaster).dispatcher(schedule.budget)
    return generation(run, inputs, **options)


def close(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> bool:
    return max(map(relative_error, ours, theirs)) <= 1e-5 and len(ours) == len(theirs)


def equal(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> bool:
    return all(map(torch.equal, ours, theirs)) and len(ours) == len(theirs)


def beginning(one: str, other: str) -> int:
    """How many steps two masks have in common before they differ."""
    return next((at for at in range(NUM_STEPS) if one[at] != other[at]), NUM_STEPS)


def engine_calls(masks: Sequence[str]) -> int:
    """Calls for recompute steps and gaps, where each mask shares what it begins with with the one before."""
    shared = [0, *(beginning(one, other) for one, other in pairwise(masks))]
    return sum(
        mask[begin:].count("1") + sum(gap.end() > begin for gap in re.finditer("0+", mask))
        for mask, begin in zip(masks, shared, strict=True)
    )


def test_generations_equal_those_of_a_fresh_dispatcher(eager: rc.Compiled) -> None:
    run = eager.engines.replay(eager.forecaster)
    for number, schedule in enumerate(schedules(7)):
        assert close(replayed(run, schedule, same=number > 0), fresh(eager, schedule))


def test_results_have_the_same_bits_whatever_was_run_before(eager: rc.Compiled) -> None:
    run, other = eager.engines.replay(eager.forecaster), {"": flux_inputs(seed=3)}
    alone = {
        schedule: replayed(eager.engines.replay(eager.forecaster), schedule, same=False) for schedule in schedules(6)
    }
    replayed(run, FULL, same=False, inputs=other)
    replayed(run, FULL, same=False, start=4)
    for number, (schedule, expected) in enumerate(alone.items()):
        assert equal(replayed(run, schedule, same=number > 0), expected)
    replayed(run, schedule, same=False, inputs=other)
    for schedule, expected in reversed(alone.items()):
        assert equal(replayed(run, schedule, same=False), expected)


def test_sorted_schedules_recompute_once_for_each_beginning(eager: rc.Compiled) -> None:
    compiled, calls = counted(eager)
    run, masks = (
        compiled.engines.replay(compiled.forecaster),
        sorted({schedule.mask for schedule in schedules(10, seed=2)}),
    )
    for number, mask in enumerate(masks):
        replayed(run, Schedule.from_mask(mask), same=number > 0)
    assert calls.pop("prologue") == 1
    assert calls.total() == engine_calls(masks) < sum(engine_calls([mask]) for mask in masks)
    assert calls["recompute"] == len({mask[: at + 1] for mask in masks for at in range(NUM_STEPS) if mask[at] == "1"})


def test_unsorted_schedules_share_what_neighbours_have_in_common(eager: rc.Compiled) -> None:
    compiled, calls = counted(eager)
    run, tried = compiled.engines.replay(compiled.forecaster), schedules(8)
    for number, schedule in enumerate(tried):
        replayed(run, schedule, same=number > 0)
    assert calls.pop("prologue") == 1
    assert calls.total() == engine_calls([schedule.mask for schedule in tried])


def test_other_noise_shares_nothing_and_the_same_schedule_everything(eager: rc.Compiled) -> None:
    compiled, calls = counted(eager)
    run, schedule = compiled.engines.replay(compiled.forecaster), schedules(4)[0]
    first = replayed(run, schedule, same=False)
    before = calls.total()
    assert equal(replayed(run, schedule, same=True), first)
    assert calls.total() == before
    noise = {"": ONE[""] | {"hidden_states": flux_inputs(seed=9)["hidden_states"]}}
    assert close(replayed(run, schedule, same=False, inputs=noise), fresh(eager, schedule, noise))
    # the conditioning is the same, so the prologue is not run again
    assert calls.total() == before + engine_calls([schedule.mask])


@pytest.mark.parametrize("late", [0, 3])
def test_guidance_branches_are_kept_apart(late: int, eager: rc.Compiled) -> None:
    """Also where one begins some steps later than the other, which is then a recompute step."""
    compiled, calls = counted(eager)
    run, tried = compiled.engines.replay(compiled.forecaster), sorted(schedules(6), key=lambda schedule: schedule.mask)
    for number, schedule in enumerate(tried):
        ours = replayed(run, schedule, same=number > 0, inputs=TWO, late=late)
        assert close(ours, fresh(eager, schedule, TWO, late=late))
    assert calls.pop("prologue") == 2
    if not late:
        assert calls.total() == 2 * engine_calls([schedule.mask for schedule in tried])


@pytest.mark.parametrize("start", [1, 5, NUM_STEPS - 1])
def test_a_start_in_the_middle(start: int, eager: rc.Compiled) -> None:
    compiled, calls = counted(eager)
    run, tried = compiled.engines.replay(compiled.forecaster), sorted(schedules(6), key=lambda schedule: schedule.mask)
    for number, schedule in enumerate(tried):
        ours = replayed(run, schedule, same=number > 0, start=start)
        assert close(ours, fresh(eager, schedule, start=start))
    assert calls.total() <= 1 + (NUM_STEPS - start) * len(tried)
    whole = replayed(run, tried[0], same=False)
    assert equal(whole, replayed(eager.engines.replay(eager.forecaster), tried[0], same=False))


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("calls_before", [0, 1, 7, 13])
def test_an_interrupted_generation_goes_on(
    calls_before: int, error: type[BaseException], eager: rc.Compiled, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled, calls = counted(eager)
    one, *_, other = schedules(5)
    run, engine = compiled.engines.replay(compiled.forecaster), type(next(iter(compiled.variants[0].engines.values())))
    proper = engine.__call__

    def failing(self: Any, inputs: Any) -> Any:
        if calls["recompute"] + calls["forecast"] == calls_before:
            raise error
        return proper(self, inputs)

    with monkeypatch.context() as patch, pytest.raises(error):
        patch.setattr(engine, "__call__", failing)
        replayed(run, one, same=False, inputs=TWO)
    expected = {
        each: replayed(eager.engines.replay(eager.forecaster), each, same=False, inputs=TWO) for each in (one, other)
    }
    assert equal(replayed(run, one, same=True, inputs=TWO), expected[one])
    calls.pop("prologue")
    again = calls.total() - 2 * engine_calls([one.mask])
    assert again in (0, 1)  # a gap of the other branch whose predictions were made ahead, and no step
    assert equal(replayed(run, other, same=True, inputs=TWO), expected[other])


def test_an_interrupted_generation_leaves_nothing_to_another(eager: rc.Compiled) -> None:
    run, other = eager.engines.replay(eager.forecaster), {"": flux_inputs(seed=3)}
    one, *_, two = schedules(4)
    run.begin(one, same=False)
    generation(run, TWO)
    run.begin(two, same=True)
    run.reset(start=None)
    for step in range(5):
        run(step=step, branch="cond", **TWO["cond"] | {"timestep": timesteps()[step]})
    assert equal(
        replayed(run, two, same=False, inputs=other),
        replayed(eager.engines.replay(eager.forecaster), two, same=False, inputs=other),
    )


def test_new_weights_share_nothing_with_the_old_ones(eager_artifact: Path) -> None:
    compiled = rc.load(eager_artifact)
    run, schedule = compiled.engines.replay(compiled.forecaster), schedules(4)[0]
    before = replayed(run, schedule, same=False)
    compiled.refit(tiny_flux(seed=1).state_dict())
    after = replayed(run, schedule, same=True)
    assert equal(after, replayed(compiled.engines.replay(compiled.forecaster), schedule, same=False))
    assert not close(after, before)


def test_another_forecaster_serves_the_same_engines(eager: rc.Compiled) -> None:
    reuse, schedule = get_forecaster("reuse"), schedules(4)[0]
    run = eager.engines.with_plans({schedule.budget: schedule}, reuse).dispatcher(schedule.budget)
    ours = replayed(eager.engines.replay(reuse), schedule, same=False)
    assert close(ours, generation(run, ONE))
    assert not close(ours, fresh(eager, schedule))


def test_writing_to_a_result_changes_no_later_generation(eager: rc.Compiled) -> None:
    run, schedule = eager.engines.replay(eager.forecaster), schedules(4)[0]
    run.begin(schedule, same=False)
    expected = [result.clone() for result in generation(run, ONE)]
    for _ in range(2):
        results = replayed(run, schedule, same=True)
        assert equal(results, expected)
        for result in results:
            result.zero_()


def test_records_are_what_was_run(eager: rc.Compiled) -> None:
    run = eager.engines.replay(eager.forecaster)
    results = replayed(run, FULL, same=False)
    assert sorted(run.records) == [("", step) for step in range(NUM_STEPS)]
    latents = ONE[""]["hidden_states"]
    for (_, step), record in sorted(run.records.items()):
        assert torch.equal(record.latents[0], latents)
        assert torch.equal(record.result[0], results[step])
        assert [feature.shape for feature in record.features.values()] == [(1, 16, 32)]
        latents = latents - 0.1 * results[step]
    features = [next(iter(record.features.values())) for record in run.records.values()]
    assert not any(torch.equal(one, two) for one, two in pairwise(features))
    schedule = schedules(4)[0]
    replayed(run, schedule, same=True)
    assert [step for (_, step), record in sorted(run.records.items()) if record.features] == [*schedule.recompute_steps]


def test_a_generation_that_turns_out_wrong_is_not_remembered(
    eager: rc.Compiled, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU, other timesteps than those compiled are only known after the last step."""
    compiled, calls = counted(eager)
    run, schedule = compiled.engines.replay(compiled.forecaster), schedules(4)[0]

    def fail(self: Tables) -> None:
        raise DispatchError("the timesteps of this generation are not those it was compiled for")

    with monkeypatch.context() as patch, pytest.raises(DispatchError, match="timesteps"):
        patch.setattr(Tables, "finish", fail)
        replayed(run, schedule, same=False)
    assert not run.records
    calls.clear()
    replayed(run, schedule, same=True)
    assert calls.total() == engine_calls([schedule.mask])


def test_a_generation_goes_on_where_its_begin_was_called_alone(eager: rc.Compiled) -> None:
    """`begin` is a reset too: for callers that start where the dispatcher does."""
    run, (one, *_, other) = eager.engines.replay(eager.forecaster), schedules(5)
    for number, schedule in enumerate((one, other, one)):
        run.begin(schedule, same=number > 0)
        assert close(generation(run, ONE, begins=False), fresh(eager, schedule))


def replaying(compiled: rc.Compiled, observer: Observer) -> ReplayDispatcher:
    sites = len(next(iter(compiled.plans.values())).steps[0].pattern)
    return ReplayDispatcher(
        compiled.forecaster, sites, NUM_STEPS, compiled.variants, compiled.engines.signature, observers=(observer,)
    )


def test_observers_are_told_of_what_engines_run(eager: rc.Compiled) -> None:
    told = StepRecorder()
    run, (one, *_, late) = replaying(eager, told), schedules(4)
    shared = next(step for step in range(NUM_STEPS) if one.mask[step] != late.mask[step])
    replayed(run, one, same=False)
    assert sorted(told.records) == sorted(run.records)
    told.forget()
    replayed(run, late, same=True)
    assert sorted(told.records) == [("", step) for step in range(shared, NUM_STEPS)]
    assert len(run.records) == NUM_STEPS


def test_changes_are_none_of_two_generations(eager: rc.Compiled) -> None:
    """The last step that an observer was told of may be one of the generation before."""
    changes, schedule = FeatureChanges(NUM_STEPS), Schedule((0, 5), NUM_STEPS)
    run = replaying(eager, changes)
    for other in ((0, 4), (0, 5)):
        replayed(run, Schedule(other, NUM_STEPS), same=True)
    assert changes.changes() == []
    replayed(run, FULL, same=False)
    before = changes.changes()
    replayed(run, schedule, same=True)
    assert changes.changes() == before


def test_what_was_forgotten_is_run_again(eager: rc.Compiled) -> None:
    compiled, calls = counted(eager)
    run, schedule = compiled.engines.replay(compiled.forecaster), schedules(4)[0]
    expected = replayed(run, schedule, same=False)
    run.forget()
    assert not run.records
    calls.clear()
    assert equal(replayed(run, schedule, same=True), expected)
    assert calls.total() == engine_calls([schedule.mask])


def test_a_generation_with_a_call_that_does_not_fit_is_not_remembered(eager: rc.Compiled) -> None:
    compiled, calls = counted(eager)
    run, schedule = compiled.engines.replay(compiled.forecaster), schedules(4)[0]
    run.begin(schedule, same=False)
    run(step=0, **ONE[""])
    with pytest.raises(MismatchError):
        run(step=1, **flux_inputs(batch=2))
    assert not run.records
    calls.clear()
    replayed(run, schedule, same=True)
    assert calls.total() - calls["prologue"] == engine_calls([schedule.mask])
