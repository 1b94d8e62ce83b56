"""Watched generations: the changes are those of the original's blocks."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from recache_compile.runtimes.dispatcher_observer import Watch
from tests.conftest import NUM_STEPS, compile_flux, flux_inputs, loop_inputs

INPUTS = flux_inputs(seed=3)


@pytest.fixture(scope="module")
def watch(flux: nn.Module) -> Watch:
    compiled = compile_flux(flux, granularity="block", residual=False, hoist=False)
    sites = len(next(iter(compiled.plans.values())).steps[0].pattern)
    return Watch(sites, NUM_STEPS, compiled.variants, compiled.signature)


def run(watch: Watch, start: int = 0) -> list[list[float | None]]:
    watch.reset(start)
    for step in range(start, NUM_STEPS):
        watch(step=step, **loop_inputs(step, INPUTS))
    return watch.changes()


def test_changes_are_those_of_what_the_blocks_return(watch: Watch, flux: nn.Module) -> None:
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
    found = run(watch)
    assert len(found) >= len(blocks)
    assert all(row[0] is None and None not in row[1:] for row in found)
    assert all((expected - value).abs().min() < 1e-5 for row in found for value in row if value is not None)


def test_steps_that_are_not_run_are_left_open(watch: Watch) -> None:
    fresh = Watch(
        len(watch.plan.steps[0].pattern),
        NUM_STEPS,
        [v for each in watch._variants.values() for v in each],
        watch._signature,
    )
    rows = run(fresh, start=4)
    assert all(row[:5] == [None] * 5 and None not in row[5:] for row in rows)


def test_results_are_those_of_the_original(watch: Watch, flux: nn.Module) -> None:
    watch.reset()
    (found,) = watch(step=0, **loop_inputs(0, INPUTS))
    (expected,) = flux(**loop_inputs(0, INPUTS), return_dict=False)
    torch.testing.assert_close(found, expected)
