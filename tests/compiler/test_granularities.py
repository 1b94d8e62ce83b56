"""Blocks, modules and residuals of a FLUX: exact at full budget, and equal to hooks on the original below it."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import recache_compile as rc
from recache_compile.errors import PassError
from recache_compile.ir.value import Kind
from tests.compiler.test_build import LATENTS, counted, relative_error
from tests.conftest import NUM_STEPS, compile_flux, flux_inputs, loop_inputs
from tests.reference import CachedReference, FeatureHistory

BUDGET = 4

LAST_LAYERS = (
    *(f"transformer_blocks.{n}.attn.{name}" for n in range(2) for name in ("to_out.0", "to_add_out")),
    *(f"transformer_blocks.{n}.{name}.net.2" for n in range(2) for name in ("ff", "ff_context")),
    *(f"single_transformer_blocks.{n}.proj_out" for n in range(3)),
)
"""Where attention and MLPs end in a FLUX: two streams in the double blocks, one layer for both in the single ones."""


@pytest.fixture(scope="module")
def by_block(flux: nn.Module) -> rc.Compiled:
    with torch.no_grad():
        return compile_flux(flux, budgets=(BUDGET, NUM_STEPS), granularity="block", order=2)


@pytest.fixture(scope="module")
def by_module(flux: nn.Module) -> rc.Compiled:
    with torch.no_grad():
        return compile_flux(flux, budgets=(BUDGET, NUM_STEPS), granularity="module")


@pytest.fixture(scope="module")
def by_residual(flux: nn.Module) -> rc.Compiled:
    with torch.no_grad():
        return compile_flux(flux, budgets=(BUDGET, NUM_STEPS), residual=True)


COMPILED = ["by_block", "by_module", "by_residual"]


def features(compiled: rc.Compiled) -> list[tuple[int | None, ...]]:
    """Shapes of what a recompute step stores."""
    outputs = compiled.variants[0].programs["recompute"].outputs
    return [value.shape for value in outputs if value.kind is Kind.FEATURE]


@pytest.mark.parametrize("name", COMPILED)
def test_full_budget_is_exact(name: str, flux: nn.Module, request: pytest.FixtureRequest) -> None:
    run = request.getfixturevalue(name).dispatcher(budget=NUM_STEPS)
    for step in range(NUM_STEPS):
        inputs = loop_inputs(step, flux_inputs())
        assert relative_error(run(step=step, **inputs)[0], flux(**inputs, return_dict=False)[0]) <= 1e-6


def assert_equals(compiled: rc.Compiled, reference: Any) -> None:
    """Step by step, to float32's rounding: the reference computes its forecasts in float64."""
    run = compiled.dispatcher(budget=BUDGET)
    for step in range(NUM_STEPS):
        inputs = loop_inputs(step, flux_inputs())
        assert relative_error(run(step=step, **inputs)[0], reference(step, **inputs)[0]) <= 1e-4


def test_block_sites_are_both_streams_of_every_block(by_block: rc.Compiled) -> None:
    """All but the text stream of the last one, which nothing reads."""
    text, image = (1, 6, 32), (1, 16, 32)
    assert Counter(features(by_block)) == {text: 4, image: 5}


def test_block_granularity_equals_hooks_that_forecast_what_blocks_add(flux: nn.Module, by_block: rc.Compiled) -> None:
    steps = by_block.schedules[BUDGET].recompute_steps
    assert_equals(by_block, CachedReference(flux, flux_inputs(), LATENTS, steps, order=2, increments=True))


def test_block_granularity_without_residuals_equals_that_of_the_stack(flux: nn.Module) -> None:
    """What blocks return, forecast one by one: the last one alone matters."""
    blocks, stack = (
        compile_flux(flux, budgets=(BUDGET,), granularity=granularity, residual=False)
        for granularity in ("block", "stack")
    )
    runs = blocks.dispatcher(budget=BUDGET), stack.dispatcher(budget=BUDGET)
    for step in range(NUM_STEPS):
        one, two = (run(step=step, **loop_inputs(step, flux_inputs()))[0] for run in runs)
        assert relative_error(one, two) <= 1e-6
    assert len(features(blocks)) == 9


def test_module_sites_are_the_last_layers_of_attention_and_mlps(flux: nn.Module, by_module: rc.Compiled) -> None:
    """Not those that other matrix products alone read: query, key, value, the MLPs' first layers."""
    assert len(features(by_module)) == len(LAST_LAYERS)
    recompute, cached = (set(by_module.variants[0].programs[name].weights) for name in ("recompute", "forecast"))
    assert {f"{name}.weight" for name in LAST_LAYERS} <= recompute - cached
    assert not [name for name in cached if "block" in name]


def test_module_granularity_equals_hooks_on_the_last_layers(flux: nn.Module, by_module: rc.Compiled) -> None:
    steps = by_module.schedules[BUDGET].recompute_steps
    assert_equals(by_module, CachedReference(flux, flux_inputs(), LATENTS, steps, names=LAST_LAYERS))


def test_module_granularity_follows_the_latents_on_cached_steps(by_module: rc.Compiled, eager: rc.Compiled) -> None:
    inputs = loop_inputs(0, flux_inputs())
    results = {}
    for name, compiled, budget in (("module", by_module, BUDGET), ("stack", eager, 3)):
        for change in (0.0, 1.0):
            run = compiled.dispatcher(budget=budget)
            run(step=0, **inputs)
            later = inputs | {"hidden_states": inputs["hidden_states"] + change}
            results[name, change] = run(step=1, **later)[0]
    assert torch.equal(results["stack", 0.0], results["stack", 1.0])
    assert relative_error(results["module", 1.0], results["module", 0.0]) > 0.01


class StackResidual:
    """Forecasts what all blocks together add: the head's input less what the embedding of the latents returns."""

    def __init__(self, flux: nn.Module, recompute_steps: tuple[int, ...]) -> None:
        self.flux, self.recompute_steps = flux, recompute_steps
        self.history = FeatureHistory("taylor", 1)
        self.step = 0

    def __call__(self, step: int, **inputs: Tensor) -> Any:
        self.step = step
        embedding = self.flux.x_embedder.register_forward_hook(self._begin)
        head = self.flux.norm_out.register_forward_pre_hook(self._end)
        try:
            return self.flux(**inputs, return_dict=False)
        finally:
            embedding.remove()
            head.remove()

    def _begin(self, module: nn.Module, args: Any, result: Tensor) -> None:
        self.before = result.double()

    def _end(self, module: nn.Module, args: Any) -> Any:
        after, *others = args
        if self.step in self.recompute_steps:
            self.history.store(self.step, after.double() - self.before)
            return args
        return ((self.before + self.history.forecast(self.step)).to(after.dtype), *others)


def test_the_residual_of_the_stack_equals_hooks_on_its_two_ends(flux: nn.Module, by_residual: rc.Compiled) -> None:
    assert by_residual.description.config.residual is True
    assert features(by_residual) == [(1, 16, 32)]
    assert_equals(by_residual, StackResidual(flux, by_residual.schedules[BUDGET].recompute_steps))


def test_a_cached_step_with_residuals_reads_the_embedding_of_the_latents_alone(by_residual: rc.Compiled) -> None:
    program = by_residual.variants[0].programs["forecast"]
    layers = {name.rpartition(".")[0] for name in program.weights}
    assert layers == {"x_embedder", "proj_out"}
    assert "hidden_states" in [value.name for value in program.inputs]


@pytest.mark.parametrize("granularity", ["output", "module"])
def test_residuals_at_other_granularities_are_refused(granularity: str, flux: nn.Module) -> None:
    with pytest.raises(PassError, match="residual caching needs granularity 'stack' or 'block'"):
        compile_flux(flux, granularity=granularity, residual=True)


@pytest.mark.parametrize("name", COMPILED)
def test_every_granularity_runs_one_engine_a_step(name: str, request: pytest.FixtureRequest) -> None:
    compiled, calls = counted(request.getfixturevalue(name))
    run = compiled.dispatcher(budget=BUDGET)
    for step in range(NUM_STEPS):
        run(step=step, **loop_inputs(step, flux_inputs()))
    assert calls["prologue"] == 1
    assert calls["recompute"] == BUDGET
    assert calls.total() == NUM_STEPS + 1


@pytest.mark.parametrize("name", COMPILED)
def test_history_is_as_large_as_the_features_of_its_anchors(name: str, request: pytest.FixtureRequest) -> None:
    compiled = request.getfixturevalue(name)
    elements = sum(batch * tokens * width for batch, tokens, width in features(compiled))
    assert compiled.cost(BUDGET).history_bytes == (compiled.forecaster.order + 1) * elements * 4


@pytest.mark.parametrize("name", COMPILED)
def test_an_artifact_of_every_granularity_gives_the_same_results(
    name: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    compiled = request.getfixturevalue(name)
    compiled.save(tmp_path / "artifact")
    loaded = rc.load(tmp_path / "artifact")
    assert loaded.description == compiled.description
    runs = compiled.dispatcher(budget=BUDGET), loaded.dispatcher(budget=BUDGET)
    for step in range(NUM_STEPS):
        expected, result = (run(step=step, **loop_inputs(step, flux_inputs()))[0] for run in runs)
        assert relative_error(result, expected) <= 1e-6
