"""CUDA graphs, with a recorder that needs no GPU: it calls the engine again on the recorded tensors."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import recache_compile as rc
from recache_compile.errors import DispatchError, RuntimeUnavailableError
from recache_compile.runtimes._cuda_graphs import Call, Recorder, stream_kept, with_graphs
from recache_compile.runtimes.dispatcher import Dispatcher
from tests.compiler.test_build import relative_error
from tests.conftest import NUM_STEPS, compile_flux, flux_inputs, loop_inputs, tiny_flux


class Again(Recorder):
    """Does what a CUDA graph does: the same call on the same memory, results into the same memory."""

    def __init__(self) -> None:
        self.recorded = 0
        self.turns = 0

    def record(self, call: Call) -> tuple[Callable[[], None], Sequence[Tensor]]:
        self.recorded += 1
        outputs = [result.clone() for result in call()]

        def replay() -> None:
            for place, result in zip(outputs, call(), strict=True):
                place.copy_(result)

        return replay, outputs

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        self.turns += 1
        yield


def graphed(compiled: rc.Compiled, recorder: Recorder | None = None) -> rc.Compiled:
    variants = tuple(with_graphs(each, recorder or Again()) for each in compiled.variants)
    return replace(compiled, engines=replace(compiled.engines, variants=variants))


def generation(run: Dispatcher, seed: int, branch: str = "") -> list[Tensor]:
    return [run(step=step, branch=branch, **loop_inputs(step, flux_inputs(seed)))[0] for step in range(NUM_STEPS)]


@pytest.mark.parametrize("budget", [3, NUM_STEPS])
def test_replays_give_the_bits_of_calls(eager: rc.Compiled, budget: int) -> None:
    run = graphed(eager).dispatcher(budget)
    for seed in (0, 1):  # the second generation replays all
        assert all(map(torch.equal, generation(run, seed), generation(eager.dispatcher(budget), seed)))


def test_gaps_share_recordings_whose_steps_are_a_power_of_two(eager: rc.Compiled) -> None:
    recorder, budget = Again(), 4
    schedule = rc.Schedule((0, 3, 6, 10), NUM_STEPS)  # gaps of 2, 2, 3 and 1 steps
    compiled = eager.engines.with_plans({budget: schedule}, eager.forecaster)
    ours, theirs = graphed(compiled, recorder).dispatcher(budget), compiled.dispatcher(budget)
    for seed in (0, 1):
        for one, other in zip(generation(ours, seed), generation(theirs, seed), strict=True):
            assert relative_error(one, other) <= 1e-6
    assert recorder.recorded == 1 + 2  # the recompute step; forecasts of 2 and of 4 steps


def test_results_are_not_overwritten_by_later_steps(eager: rc.Compiled) -> None:
    run = graphed(eager).dispatcher(3)
    results = [run(step=step, **loop_inputs(step, flux_inputs()))[0] for step in range(3)]
    copies = [result.clone() for result in results]
    generation(run, 1)
    assert all(map(torch.equal, results, copies))


def test_branches_share_graphs_and_no_values(eager: rc.Compiled) -> None:
    run, alone = graphed(eager).dispatcher(3), eager.dispatcher(3)
    for step in range(NUM_STEPS):
        for seed, branch in ((0, "cond"), (1, "uncond")):
            inputs = loop_inputs(step, flux_inputs(seed))
            ours, theirs = (each(step=step, branch=branch, **inputs)[0] for each in (run, alone))
            assert torch.equal(ours, theirs)


def test_every_program_is_recorded_once_for_all_dispatchers(eager: rc.Compiled) -> None:
    again = Again()
    compiled = graphed(eager, again)
    for budget in (3, NUM_STEPS, 3):
        run = compiled.dispatcher(budget)
        for seed in range(2):
            generation(run, seed)
            run.reset()
    assert again.recorded == len({step.program for step in eager.plans[3].steps}) == 2
    assert again.turns == 2 * (6 + NUM_STEPS + 6)  # three recompute steps and as many gaps


def test_a_generation_that_was_broken_off_leaves_nothing(eager: rc.Compiled) -> None:
    run = graphed(eager).dispatcher(3)
    for step in range(7):
        run(step=step, **loop_inputs(step, flux_inputs(1)))
    run.reset()
    assert all(map(torch.equal, generation(run, 0), generation(eager.dispatcher(3), 0)))


def test_new_weights_are_seen() -> None:
    compiled, other = compile_flux(tiny_flux()), tiny_flux(1)
    run = graphed(compiled).dispatcher(3)
    generation(run, 0)
    compiled.refit(other.state_dict())
    expected = generation(compile_flux(other).dispatcher(3), 0)
    assert max(map(relative_error, generation(run, 0), expected)) <= 1e-6


def test_what_cannot_be_recorded_names_the_program_and_the_remedy(eager: rc.Compiled) -> None:
    class Refusing(Again):
        def record(self, call: Call) -> Any:
            raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(DispatchError, match=r"recompute: cannot be part of a CUDA graph .*cuda_graphs=False"):
        graphed(eager, Refusing()).dispatcher(3)(step=0, **flux_inputs())


def test_the_callers_stream_is_back_after_a_recording_that_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    streams = ["the caller's"]
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: streams[-1])
    monkeypatch.setattr(torch.cuda, "set_stream", streams.append)
    with pytest.raises(RuntimeError, match="capture"), stream_kept():
        streams.append("the recording's")
        raise RuntimeError("capture")
    assert streams[-1] == "the caller's"


def test_engines_on_the_cpu_have_no_graphs(flux: torch.nn.Module) -> None:
    with pytest.raises(RuntimeUnavailableError, match="CUDA graphs: cannot be made of engines of runtime eager on cpu"):
        compile_flux(flux, cuda_graphs=True)


def test_artifacts_on_the_cpu_have_no_graphs(eager_artifact: Path) -> None:
    with pytest.raises(RuntimeUnavailableError, match=r"leave them out \(cuda_graphs=False, --no-cuda-graphs\)"):
        rc.load(eager_artifact, cuda_graphs=True)


def test_generations_from_other_starts_share_the_graphs(eager: rc.Compiled) -> None:
    again = Again()
    run, plain = graphed(eager, again).dispatcher(3), eager.dispatcher(3)
    for start in (0, 5, 0, 5):
        for each in (run, plain):
            each.reset(start)
        for step in range(start, NUM_STEPS):
            inputs = loop_inputs(step, flux_inputs(start))
            assert torch.equal(run(step=step, **inputs)[0], plain(step=step, **inputs)[0])
    assert again.recorded == 3


def test_modes_of_the_caller_may_change(eager: rc.Compiled) -> None:
    run = graphed(eager).dispatcher(3)
    expected = generation(eager.dispatcher(3), 0)
    for mode in (torch.inference_mode, torch.no_grad, torch.enable_grad, torch.inference_mode):
        with mode():
            assert all(map(torch.equal, generation(run, 0), expected))
