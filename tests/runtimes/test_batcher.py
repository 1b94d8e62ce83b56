"""Generations in threads that share recompute calls: each result is the one that it gets alone."""

import gc
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import recache_compile as rc
from recache_compile.compiler.overlay import Change, Patch
from recache_compile.errors import DispatchError
from recache_compile.ir.program import REQUESTS
from recache_compile.runtimes.base import Engine
from recache_compile.runtimes.batcher import Lane
from tests.compiler.test_build import relative_error
from tests.conftest import compile_flux, flux_inputs, loop_inputs

SAME = 1e-5
"""Bound of what rows of one call differ by from calls of their own: larger products are summed in another order."""


@pytest.fixture(scope="module")
def engines(flux: torch.nn.Module) -> rc.Compiled:
    return compile_flux(flux, batching=True, policy="uniform")


@dataclass(frozen=True)
class Request:
    """A generation: its prompt and noise, length, budget, and the step at which it is given up."""

    seed: int
    num_steps: int
    budget: int
    until: int | None = None


def generate(compiled: rc.Compiled, request: Request) -> list[Tensor]:
    with torch.no_grad():
        run = compiled.dispatcher(request.budget, num_steps=request.num_steps)
        results = []
        for step in range(request.num_steps):
            if step == request.until:
                return []
            inputs = loop_inputs(step % 12, flux_inputs(request.seed))
            inputs["timestep"] = torch.tensor([1 - step / request.num_steps])
            results.append(run(step=step, **inputs)[0])
        return results


def lane_of(batched: rc.Compiled, number: int = 0) -> Lane:
    """Where the recompute calls of one kind wait."""
    inputs = batched.variants[number].programs["recompute"].inputs
    shapes = [[size for size in value.shape if size is not None] for value in inputs]
    assert batched.shared is not None
    return batched.shared._lanes[number].of([torch.empty(shape) for shape in shapes])


def counting(compiled: rc.Compiled) -> tuple[rc.Compiled, Counter[int]]:
    """The same with engines that count their recompute calls by the number of requests in them."""
    sizes: Counter[int] = Counter()

    def counted(name: str, engine: Engine) -> Callable[[Sequence[Tensor]], Sequence[Tensor]]:
        def call(inputs: Sequence[Tensor]) -> Sequence[Tensor]:
            if name in ("recompute", REQUESTS):
                sizes[len(inputs[0]) if name == REQUESTS else 1] += 1
            return engine(inputs)

        return call

    variants = tuple(
        replace(each, engines={name: counted(name, engine) for name, engine in each.engines.items()})
        for each in compiled.variants
    )
    return replace(compiled, engines=replace(compiled.engines, variants=variants)), sizes


requests = st.builds(
    lambda seed, steps, share, until: Request(
        seed, steps, max(1, round(share * steps)), None if until is None else until % steps
    ),
    st.integers(0, 3),
    st.integers(1, 6),
    st.floats(0, 1),
    st.none() | st.integers(0, 5),
)


@settings(deadline=None, max_examples=12, suppress_health_check=list(HealthCheck))
@given(mix=st.lists(requests, min_size=1, max_size=8), max_batch=st.integers(1, 8))
def test_every_result_is_the_one_that_a_request_gets_alone(
    engines: rc.Compiled, mix: list[Request], max_batch: int
) -> None:
    counted, sizes = counting(engines)
    batched = counted.batcher(max_batch, max_wait_ms=20)
    with ThreadPoolExecutor(len(mix)) as pool:
        found = list(pool.map(lambda request: generate(batched, request), mix))
    assert max(sizes, default=1) <= max_batch
    for request, results in zip(mix, found, strict=True):
        expected = generate(engines, request)
        assert len(results) == len(expected)
        for ours, alone in zip(results, expected, strict=True):
            assert relative_error(ours, alone) <= SAME


def test_requests_share_every_call_once_they_are_known(engines: rc.Compiled) -> None:
    """The first call is held until the three others wait: whoever is behind at the end, one call is of one, one of three, two are of all."""
    counted, sizes = counting(engines)
    (variant,), is_first = counted.variants, threading.Event()
    recompute = variant.engines["recompute"]

    def held(inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        is_first.set()
        latest = time.monotonic() + 60
        while len(lane._waiting) < 3 and time.monotonic() < latest:
            time.sleep(0.001)
        return recompute(inputs)

    variants = (replace(variant, engines={**variant.engines, "recompute": held}),)
    batched = replace(counted, engines=replace(counted.engines, variants=variants)).batcher(max_wait_ms=60_000)
    lane = lane_of(batched)
    with ThreadPoolExecutor(4) as pool:
        found = [pool.submit(generate, batched, Request(0, 9, 3))]
        is_first.wait()
        found += [pool.submit(generate, batched, Request(seed, 6 + seed, 3)) for seed in range(1, 4)]
        assert [len(each.result()) for each in found] == [9, 7, 8, 9]
    assert sizes == {1: 1, 3: 1, 4: 2}


def test_a_lone_request_never_waits_and_runs_the_usual_engine(engines: rc.Compiled) -> None:
    counted, sizes = counting(engines)
    request = Request(0, 6, 3)
    alone = generate(counted.batcher(max_wait_ms=3_600_000), request)
    assert sizes == {1: 3}
    for ours, expected in zip(alone, generate(engines, request), strict=True):
        assert torch.equal(ours, expected)


def test_nobody_waits_for_long_for_one_that_stays_away(engines: rc.Compiled) -> None:
    counted, sizes = counting(engines)
    batched = counted.batcher(max_wait_ms=1)
    assert generate(batched, Request(0, 6, 6, until=3)) == []
    assert len(generate(batched, Request(1, 6, 6))) == 6
    assert sizes == {1: 9}


def test_an_error_reaches_all_whose_call_it_was_and_the_next_ones_run(engines: rc.Compiled) -> None:
    fails = threading.Event()

    def failing(engine: Engine) -> Callable[[Sequence[Tensor]], Sequence[Tensor]]:
        def call(inputs: Sequence[Tensor]) -> Sequence[Tensor]:
            if fails.is_set():
                raise RuntimeError("no memory")
            return engine(inputs)

        return call

    variants = tuple(
        replace(each, engines={name: failing(engine) for name, engine in each.engines.items()})
        for each in engines.variants
    )
    batched = replace(engines, engines=replace(engines.engines, variants=variants)).batcher(max_wait_ms=20)
    fails.set()
    with ThreadPoolExecutor(3) as pool:
        waiting = [pool.submit(generate, batched, Request(seed, 4, 4)) for seed in range(3)]
        assert {str(each.exception()) for each in waiting} == {"no memory"}
    fails.clear()
    assert len(generate(batched, Request(0, 4, 4))) == 4


def test_a_thread_that_is_interrupted_while_it_waits_leaves_the_others_alone(engines: rc.Compiled) -> None:
    batched = engines.batcher(max_wait_ms=30)
    lane = lane_of(batched)
    original, stopped = lane._time_left, threading.current_thread()

    def interrupted(call: Any) -> float | None:
        if threading.current_thread() is stopped:
            raise KeyboardInterrupt
        return original(call)

    lane._time_left = interrupted  # type: ignore[method-assign]
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(generate, batched, Request(0, 6, 6))
        while not lane._coming:
            time.sleep(0.001)
        with pytest.raises(KeyboardInterrupt):
            generate(batched, Request(1, 6, 6))
        assert len(other.result()) == 6


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ({"max_batch": 0}, "max_batch 0: expected a whole number from 1 on"),
        ({"max_batch": 2.5}, "max_batch 2.5: expected a whole number"),
        ({"max_wait_ms": -1}, "max_wait_ms -1: expected 0 or more"),
        ({"max_wait_ms": float("nan")}, "max_wait_ms nan: expected 0 or more"),
    ],
)
def test_bounds_that_make_no_sense_are_refused(bounds: dict[str, Any], message: str, engines: rc.Compiled) -> None:
    with pytest.raises(DispatchError, match=message):
        engines.batcher(**bounds)


def test_engines_for_one_request_are_refused(eager: rc.Compiled) -> None:
    with pytest.raises(DispatchError, match=r"for one request at a time; compile with batching=True \(--batching\)"):
        eager.batcher()


def test_abandoned_and_interrupted_generations_are_forgotten(engines: rc.Compiled) -> None:
    batched = engines.batcher(max_wait_ms=1)
    lane = lane_of(batched)
    for seed in range(3):
        generate(batched, Request(seed, 6, 6, until=3))
    gc.collect()
    assert len(lane._coming) == 0
    run = batched.dispatcher(6, num_steps=6)
    run(step=0, **loop_inputs(0, flux_inputs()))
    assert len(lane._coming) == 1
    run.reset()
    assert len(lane._coming) == 0


def test_branches_are_one_member(engines: rc.Compiled) -> None:
    """While the second branch of the last recompute step is to come, the generation is not over."""
    batched = engines.batcher(max_wait_ms=1)
    lane = lane_of(batched)
    run, coming = batched.dispatcher(2, num_steps=4), []
    for step in range(4):
        for branch in ("cond", "uncond"):
            run(step=step, branch=branch, **loop_inputs(step, flux_inputs()))
            coming.append(len(lane._coming))
    assert coming == [1, 1, 1, 1, 1, 0, 0, 0]


def test_branches_of_other_shapes_wait_in_other_lanes(flux: torch.nn.Module) -> None:
    first, second = flux_inputs(), flux_inputs()
    second["encoder_hidden_states"], second["txt_ids"] = torch.randn(1, 4, 24), torch.zeros(4, 3)
    options = {"budgets": (2,), "num_steps": 4, "runtime": "eager", "policy": "uniform", "batching": True}
    options |= {"fixed_sizes": True}
    batched = rc.compile(flux, [first, second], **options).batcher(max_wait_ms=1)
    one, other = lane_of(batched, 0), lane_of(batched, 1)
    run, coming = batched.dispatcher(2), []
    for step in range(4):
        for branch, inputs in (("cond", first), ("uncond", second)):
            run(step=step, branch=branch, **loop_inputs(step, inputs))
            coming.append((len(one._coming), len(other._coming)))
    assert coming == [(1, 0), (0, 1), (0, 1), (0, 1), (0, 1), (0, 0), (0, 0), (0, 0)]


def test_requests_with_other_weights_take_turns_and_all_are_served(engines: rc.Compiled) -> None:
    """Calls wait in a lane while others wait for the weights, and somebody changes them in between."""
    shared, name = engines.engines, "proj_out.weight"

    def patch(factor: float) -> Callable[[], Patch]:
        def write(base: Any, out: Any) -> None:
            torch.mul(base[name], factor, out=out[name])

        return lambda: Patch(changes=(Change({name: None}, write),))

    def draw(compiled: rc.Compiled, seed: int, factor: float) -> list[Tensor]:
        with torch.no_grad():
            run, results = compiled.dispatcher(4), []
            for step in range(12):
                with shared.reading(factor, patch(factor)):
                    results.append(run(step=step, **loop_inputs(step, flux_inputs(seed)))[0].clone())
            return results

    jobs = [(seed, 1.0 + seed % 2) for seed in range(4)]
    expected = [draw(engines, *job) for job in jobs]
    batched, start = engines.batcher(max_batch=4, max_wait_ms=1), threading.Barrier(5)

    def drawn(job: tuple[int, float]) -> list[Tensor]:
        start.wait()
        return draw(batched, *job)

    def change() -> None:
        start.wait()
        for _ in range(5):
            with shared.alone():
                shared.overlay.forget()

    with ThreadPoolExecutor(5) as pool:
        changes = pool.submit(change)
        found = [future.result(120) for future in [pool.submit(drawn, job) for job in jobs]]
        changes.result(120)
    with shared.reading():
        assert shared.overlay.weights == {}
    for one, other in zip(found, expected, strict=True):
        assert max(map(relative_error, one, other)) <= SAME


@pytest.mark.slow
def test_the_compiled_program_for_several_requests_gives_what_that_for_one_does(flux: torch.nn.Module) -> None:
    (variant,) = compile_flux(flux, runtime="inductor", batching=True).variants
    generator = torch.Generator().manual_seed(0)
    for number in (2, 5):
        given = [
            torch.randn([number, *value.shape], generator=generator) for value in variant.programs["recompute"].inputs
        ]
        results = variant.engines[REQUESTS](given)
        for row in range(number):
            alone = variant.engines["recompute"]([value[row].contiguous() for value in given])
            for ours, expected in zip(results, alone, strict=True):
                assert relative_error(ours[row], expected) <= SAME
