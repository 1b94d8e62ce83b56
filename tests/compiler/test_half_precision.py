"""bfloat16 and float16: a full budget is the module's own arithmetic, a forecast is rounded once."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import recache_compile as rc
from tests.compiler.test_build import relative_error
from tests.conftest import NUM_STEPS, flux_inputs, loop_inputs, timesteps, tiny_flux

BUDGET = 3
DTYPES = [torch.bfloat16, torch.float16]


def cast(inputs: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: value.to(dtype) for name, value in inputs.items()}


def compile_half(dtype: torch.dtype, **options: Any) -> tuple[nn.Module, rc.Compiled]:
    module = tiny_flux().to(dtype)
    options = {"budgets": (BUDGET, NUM_STEPS), "num_steps": NUM_STEPS, "runtime": "eager"} | options
    return module, rc.compile(module, cast(flux_inputs(), dtype), timesteps={"timestep": timesteps()}, **options)


def loop(dtype: torch.dtype) -> list[dict[str, Tensor]]:
    return [cast(loop_inputs(step, flux_inputs()), dtype) for step in range(NUM_STEPS)]


class RoundedOnce:
    """Hooks that forecast the image stream: in float32, from features in half precision, rounded when complete.

    At `stack` the feature is what the last block returns, at `block` what each block adds, rounded when stored.
    """

    def __init__(self, module: nn.Module, granularity: str, recompute_steps: tuple[int, ...]) -> None:
        blocks = [*module.transformer_blocks, *module.single_transformer_blocks]
        self.module, self.recompute_steps = module, recompute_steps
        self.increments = granularity == "block"
        self.blocks = blocks if self.increments else blocks[-1:]
        self.features: dict[int, list[tuple[int, Tensor]]] = {number: [] for number in range(len(self.blocks))}

    def __call__(self, step: int, inputs: dict[str, Tensor]) -> Tensor:
        handles = [
            block.register_forward_hook(
                lambda block, args, kwargs, result, number=number: self._hook(step, number, kwargs, result),
                with_kwargs=True,
            )
            for number, block in enumerate(self.blocks)
        ]
        try:
            return self.module(**inputs, return_dict=False)[0]
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, step: int, number: int, kwargs: Any, result: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        text, image = result
        base, anchors = kwargs["hidden_states"].float(), self.features[number]
        if step in self.recompute_steps:
            feature = (image.float() - base).to(image.dtype) if self.increments else image
            self.features[number] = [*anchors[-1:], (step, feature)]
            return result
        total = anchors[-1][1].float()
        if len(anchors) == 2:
            (before, older), (last, newer) = anchors
            slope = (step - last) / (last - before)
            total = newer.float() * torch.tensor(1 + slope) + older.float() * torch.tensor(-slope)
        return text, (base + total if self.increments else total).to(image.dtype)


@pytest.mark.parametrize("granularity", ["stack", "block"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_step_without_hoisting_is_bit_for_bit_what_the_module_computes(
    dtype: torch.dtype, granularity: str
) -> None:
    """The same operators on the same shapes in the same order; on cached steps behind forecasts rounded once.

    Two terms: their order does not change the sum.
    """
    module, compiled = compile_half(dtype, granularity=granularity, hoist=False)
    full, small = compiled.dispatcher(budget=NUM_STEPS), compiled.dispatcher(budget=BUDGET)
    reference = RoundedOnce(module, granularity, compiled.schedules[BUDGET].recompute_steps)
    for step, inputs in enumerate(loop(dtype)):
        (result,) = full(step=step, **inputs)
        assert result.dtype == dtype
        assert torch.equal(result, module(**inputs, return_dict=False)[0])
        assert torch.equal(small(step=step, **inputs)[0], reference(step, inputs))


@pytest.mark.parametrize("dtype", DTYPES)
def test_full_budget_with_hoisting_is_exact_but_for_flipped_roundings(dtype: torch.dtype) -> None:
    """The prologue computes the rows of all steps at once, so its matrix products may sum in another order.

    That can flip the rounding of a modulation: a relative change of at most eps.  Five blocks and the head are
    modulated, and each passes what it is given on in proportion: 6 eps of the largest value, to first order.
    """
    module, compiled = compile_half(dtype)
    assert compiled.variants[0].programs["prologue"].outputs[0].dtype == dtype
    run = compiled.dispatcher(budget=NUM_STEPS)
    for step, inputs in enumerate(loop(dtype)):
        expected = module(**inputs, return_dict=False)[0].float()
        assert relative_error(run(step=step, **inputs)[0].float(), expected) <= 6 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", DTYPES)
def test_timesteps_known_in_float32_are_rounded_as_the_loop_does(dtype: torch.dtype) -> None:
    """Else every row would be computed again when its step comes."""
    _, compiled = compile_half(dtype, budgets=(BUDGET,), granularity="output")
    column = compiled.variants[0].timesteps["timestep"]
    assert column.dtype == dtype
    assert torch.equal(column, torch.stack([inputs["timestep"] for inputs in loop(dtype)]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_features_are_held_in_half_precision(dtype: torch.dtype, eager: rc.Compiled) -> None:
    _, compiled = compile_half(dtype, budgets=(3,))
    assert compiled.cost(3).history_bytes == eager.cost(3).history_bytes / 2
    assert compiled.description.config.dtype == str(dtype).removeprefix("torch.")


def test_half_precision_artifacts_keep_every_bit(tmp_path: Any) -> None:
    _, compiled = compile_half(torch.bfloat16, budgets=(BUDGET,))
    compiled.save(tmp_path / "artifact")
    loaded = rc.load(tmp_path / "artifact")
    assert all(torch.equal(weight, compiled.weights[name]) for name, weight in loaded.weights.items())
    runs = compiled.dispatcher(budget=BUDGET), loaded.dispatcher(budget=BUDGET)
    for step, inputs in enumerate(loop(torch.bfloat16)):
        one, two = (run(step=step, **inputs)[0].float() for run in runs)
        assert relative_error(one, two) <= 6 * torch.finfo(torch.bfloat16).eps


def test_float32_engines_refuse_half_precision(eager: rc.Compiled) -> None:
    with pytest.raises(rc.RecacheError, match=r"hidden_states is bfloat16\[1, 16, 8\], compiled float32\[1, 16, 8\]"):
        eager.dispatcher(budget=3)(step=0, **loop(torch.bfloat16)[0])
