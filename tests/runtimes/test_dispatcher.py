"""Dispatch: state per branch and shape, conditioning that changes, calls that do not fit."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import recache_compile as rc
from recache_compile.errors import DispatchError, MismatchError
from recache_compile.runtimes import dispatcher as dispatcher_module
from recache_compile.runtimes.base import Engine
from tests.compiler.test_build import LATENTS, counted, relative_error
from tests.conftest import NUM_STEPS, compile_flux, flux_inputs, loop_inputs, timesteps
from tests.reference import CachedReference


def generation(run: Any, inputs: dict[str, torch.Tensor], branch: str = "") -> list[torch.Tensor]:
    return [run(step=step, branch=branch, **loop_inputs(step, inputs))[0] for step in range(NUM_STEPS)]


def test_generations_do_not_leak_into_each_other(eager: rc.Compiled) -> None:
    one, two = flux_inputs(seed=1), flux_inputs(seed=2)
    shared = eager.dispatcher(budget=3)
    for inputs in (one, two, one):
        alone = generation(eager.dispatcher(budget=3), inputs)
        assert all(map(torch.equal, generation(shared, inputs), alone))


def test_branches_have_a_state_of_their_own(eager: rc.Compiled) -> None:
    inputs = {"cond": flux_inputs(seed=1), "uncond": flux_inputs(seed=2)}
    run = eager.dispatcher(budget=3)
    together: dict[str, list[torch.Tensor]] = {"cond": [], "uncond": []}
    for step in range(NUM_STEPS):
        for branch, example in inputs.items():
            together[branch].append(run(step=step, branch=branch, **loop_inputs(step, example))[0])
    for branch, example in inputs.items():
        assert all(map(torch.equal, together[branch], generation(eager.dispatcher(budget=3), example)))


def test_prologue_runs_again_only_when_conditioning_changes(eager: rc.Compiled) -> None:
    compiled, calls = counted(eager)
    run, inputs = compiled.dispatcher(budget=3), flux_inputs()
    generation(run, inputs)
    assert calls["prologue"] == 1
    generation(run, inputs)
    generation(run, {name: value.clone() for name, value in inputs.items()})
    assert calls["prologue"] == 1
    generation(run, {**inputs, "encoder_hidden_states": inputs["encoder_hidden_states"] + 1})
    assert calls["prologue"] == 2


def test_conditioning_written_in_place_is_noticed(eager: rc.Compiled, flux: torch.nn.Module) -> None:
    run, inputs = eager.dispatcher(budget=NUM_STEPS), flux_inputs()
    run(step=0, **loop_inputs(0, inputs))
    inputs["pooled_projections"].add_(1)
    this = loop_inputs(1, inputs)
    assert relative_error(run(step=1, **this)[0], flux(**this, return_dict=False)[0]) <= 1e-6


def test_conditioning_written_under_inference_mode_is_noticed(eager: rc.Compiled, flux: torch.nn.Module) -> None:
    run = eager.dispatcher(budget=NUM_STEPS)
    with torch.inference_mode():
        inputs = {name: value.clone() for name, value in flux_inputs().items()}
        run(step=0, **loop_inputs(0, inputs))
        inputs["pooled_projections"].add_(1)
        this = loop_inputs(1, inputs)
        assert relative_error(run(step=1, **this)[0], flux(**this, return_dict=False)[0]) <= 1e-6


def test_unknown_timesteps_are_learned_in_the_first_generation(flux: torch.nn.Module) -> None:
    compiled, calls = counted(compile_flux(flux, budgets=(3,)))
    known = generation(compiled.dispatcher(budget=3), flux_inputs())
    plain = rc.compile(flux, flux_inputs(), budgets=(3,), num_steps=NUM_STEPS, runtime="eager")
    compiled, calls = counted(plain)
    run = compiled.dispatcher(budget=3)
    first = generation(run, flux_inputs())
    assert calls["prologue"] == NUM_STEPS
    generation(run, flux_inputs(seed=5))
    assert calls["prologue"] == NUM_STEPS + 1
    assert max(map(relative_error, first, known)) <= 1e-6


def test_other_timesteps_than_compiled_are_noticed(eager: rc.Compiled, flux: torch.nn.Module) -> None:
    run = eager.dispatcher(budget=NUM_STEPS)
    for step in range(3):
        this = loop_inputs(step, flux_inputs()) | {"timestep": torch.tensor([0.9 - 0.1 * step])}
        assert relative_error(run(step=step, **this)[0], flux(**this, return_dict=False)[0]) <= 1e-6


def test_a_changed_result_does_not_change_the_history(flux: torch.nn.Module) -> None:
    compiled = compile_flux(flux, budgets=(3,), granularity="output")
    clean = generation(compiled.dispatcher(budget=3), flux_inputs())
    run = compiled.dispatcher(budget=3)
    for step, expected in enumerate(clean):
        (result,) = run(step=step, **loop_inputs(step, flux_inputs()))
        assert torch.equal(result, expected)
        result.zero_()


def test_latents_that_are_not_contiguous(eager: rc.Compiled, flux: torch.nn.Module) -> None:
    this = loop_inputs(0, flux_inputs())
    this["hidden_states"] = this["hidden_states"].transpose(1, 2).contiguous().transpose(1, 2)
    (ours,) = eager.dispatcher(budget=3)(step=0, **this)
    assert relative_error(ours, flux(**this, return_dict=False)[0]) <= 1e-6


def test_reset_starts_a_new_generation(eager: rc.Compiled) -> None:
    run = eager.dispatcher(budget=3)
    run(step=0, **loop_inputs(0, flux_inputs()))
    run.reset()
    with pytest.raises(DispatchError, match="step 1 does not follow"):
        run(step=1, **loop_inputs(1, flux_inputs()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_states": torch.zeros(1, 9, 8)}, r"hidden_states is float32\[1, 9, 8\], compiled float32\[1, 16, 8\]"),
        ({"timestep": torch.zeros(1, dtype=torch.int64)}, r"timestep is int64\[1\], compiled float32\[1\]"),
        ({"guidance": None}, r"guidance is None, compiled float32\[1\]"),
        ({"hidden_states": torch.zeros(1, 16, 8, device="meta")}, "is on meta"),
        ({"joint_attention_kwargs": {"scale": 0.5}}, "joint_attention_kwargs.scale is 0.5, compiled without"),
        (
            {"controlnet_block_samples": [torch.zeros(1)]},
            r"controlnet_block_samples.0 is float32\[1\], compiled without; .* compile for them too",
        ),
    ],
)
def test_calls_that_do_not_fit_are_refused(change: dict[str, Any], message: str, eager: rc.Compiled) -> None:
    with pytest.raises(MismatchError, match=message):
        eager.dispatcher(budget=3)(step=0, **(loop_inputs(0, flux_inputs()) | change))


@pytest.mark.parametrize(
    ("steps", "message"), [((0, 2), "does not follow step 0"), ((3,), "does not follow"), ((12,), "0..11")]
)
def test_steps_out_of_order_are_refused(steps: tuple[int, ...], message: str, eager: rc.Compiled) -> None:
    run = eager.dispatcher(budget=3)
    with pytest.raises(DispatchError, match=message):
        for step in steps:
            run(step=step, **loop_inputs(min(step, 11), flux_inputs()))


def calls_from(start: int, run: Any) -> list[torch.Tensor]:
    run.reset(start=start)
    return [run(step=step, **loop_inputs(step, flux_inputs()))[0] for step in range(start, NUM_STEPS)]


@pytest.mark.parametrize(
    ("start", "recompute", "cached"),
    [
        (0, 3, {"forecast": 3}),
        (4, 2, {"forecast": 2}),
        (6, 2, {"forecast": 2}),
        (7, 2, {"forecast": 1}),
        (9, 1, {"forecast": 1}),
        (11, 1, {}),
    ],
)
def test_a_start_in_the_middle_recomputes_there_and_where_the_schedule_says(
    start: int, recompute: int, cached: dict[str, int], eager: rc.Compiled, flux: torch.nn.Module
) -> None:
    assert eager.schedules[3].recompute_steps == (0, 4, 8)
    compiled, calls = counted(eager)
    results = calls_from(start, compiled.dispatcher(budget=3))
    assert calls == {"prologue": 1, "recompute": recompute, **cached}
    by_hand = tuple(sorted({start, *(step for step in (0, 4, 8) if step > start)}))
    reference = CachedReference(flux, flux_inputs(), LATENTS, by_hand)
    for step, result in enumerate(results, start):
        assert relative_error(result, reference(step, **loop_inputs(step, flux_inputs()))[0]) <= 1e-4


def test_a_start_in_the_middle_equals_a_schedule_that_was_compiled_for_it(
    eager: rc.Compiled, flux: torch.nn.Module
) -> None:
    start = 3
    by_hand = rc.compile(
        flux,
        flux_inputs(),
        budgets=(3,),
        num_steps=NUM_STEPS - start,
        policy={3: (0, 1, 5)},
        timesteps={"timestep": timesteps()[start:]},
        runtime="eager",
    ).dispatcher(budget=3)
    for step, result in enumerate(calls_from(start, eager.dispatcher(budget=3)), start):
        (expected,) = by_hand(step=step - start, **loop_inputs(step, flux_inputs()))
        assert relative_error(result, expected) <= 1e-6


def test_starts_do_not_leak_into_each_other(eager: rc.Compiled) -> None:
    shared = eager.dispatcher(budget=3)
    for start in (0, 5, 5, 0, 2):
        alone = calls_from(start, eager.dispatcher(budget=3))
        assert all(map(torch.equal, calls_from(start, shared), alone))


def test_the_first_step_starts_again_wherever_it_is(eager: rc.Compiled) -> None:
    run = eager.dispatcher(budget=3)
    first = calls_from(5, run)
    for step in (5, 6):
        (again,) = run(step=step, **loop_inputs(step, flux_inputs()))
        assert torch.equal(again, first[step - 5])
    with pytest.raises(DispatchError, match=r"step 0 does not follow step 6: .* or start again at step 5"):
        run(step=0, **loop_inputs(0, flux_inputs()))


@pytest.mark.parametrize("start", [-1, NUM_STEPS])
def test_a_start_outside_of_the_loop_is_refused(start: int, eager: rc.Compiled) -> None:
    with pytest.raises(DispatchError, match=rf"start {start}: expected 0\.\.11"):
        eager.dispatcher(budget=3).reset(start=start)


def test_timesteps_are_learned_from_a_start_in_the_middle(eager: rc.Compiled, flux: torch.nn.Module) -> None:
    plain = rc.compile(flux, flux_inputs(), budgets=(3,), num_steps=NUM_STEPS, runtime="eager")
    learning, known = plain.dispatcher(budget=3), calls_from(7, eager.dispatcher(budget=3))
    for _ in range(2):
        assert max(map(relative_error, calls_from(7, learning), known)) <= 1e-6


def test_a_budget_without_a_policy_to_ask_names_those_there_are(eager: rc.Compiled) -> None:
    given = eager.engines.with_plans(eager.schedules, eager.forecaster)
    with pytest.raises(DispatchError, match="budget 4 was not compiled; there are 3, 12, whose schedules were given"):
        given.dispatcher(budget=4)


class Scaled(torch.nn.Module):
    """A second result that depends on the conditioning alone, and a constant with a default."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(4, 4)

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor, context: torch.Tensor, scale: float = 1.0) -> Any:
        return self.linear(sample) * scale + timestep.sin() * context.exp(), context.cos()


def scaled(**changes: Any) -> dict[str, Any]:
    return {"sample": torch.ones(3, 4), "timestep": torch.ones(1), "context": torch.ones(3, 4)} | changes


def compile_scaled(model: Scaled, **changes: Any) -> rc.Compiled:
    options = {"budgets": (2,), "num_steps": 4, "granularity": "output", "runtime": "eager"}
    return rc.compile(model, scaled(**changes), timesteps={"timestep": torch.ones(4, 1)}, **options)


def test_a_constant_that_is_left_out_has_its_default() -> None:
    run = compile_scaled(Scaled(), scale=2.0).dispatcher(budget=2)
    with pytest.raises(MismatchError, match=r"no engine for these inputs: scale is 1\.0, compiled 2\.0; compile"):
        run(step=0, **scaled())
    compile_scaled(Scaled()).dispatcher(budget=2)(step=0, **scaled(scale=1.0))


def test_writing_to_a_result_does_not_change_the_next_step() -> None:
    model = Scaled()
    run = compile_scaled(model).dispatcher(budget=2)
    for step in range(2):
        results = run(step=step, **scaled())
        assert relative_error(results[0], model(**scaled())[0]) <= 1e-6
        assert torch.equal(results[1], model(**scaled())[1])
        for result in results:
            result.zero_()


def test_conditioning_written_behind_the_version_counter_is_noticed() -> None:
    model = Scaled()
    run, inputs = compile_scaled(model).dispatcher(budget=2), scaled()
    run(step=0, **inputs)
    inputs["context"].data.add_(1)
    run(step=0, **inputs)
    assert relative_error(run(step=0, **inputs)[0], model(**inputs)[0]) <= 1e-6


def test_a_prologue_that_failed_runs_again() -> None:
    model = Scaled()
    compiled, _ = counted(compile_scaled(model))
    run = compiled.dispatcher(budget=2)
    run(step=0, **scaled())
    prologue = compiled.variants[0].engines["prologue"].engine

    def fail(inputs: Any) -> Any:
        raise MemoryError

    for change in ({"context": torch.zeros(3, 4)}, {"timestep": torch.zeros(1)}):
        compiled.variants[0].engines["prologue"].engine = fail
        with pytest.raises(MemoryError):
            run(step=0, **scaled(**change))
        compiled.variants[0].engines["prologue"].engine = prologue
        assert relative_error(run(step=0, **scaled(**change))[0], model(**scaled(**change))[0]) <= 1e-6


def test_engines_are_called_with_their_own_gpu_as_the_current_one(
    eager: rc.Compiled, monkeypatch: pytest.MonkeyPatch
) -> None:
    current: list[torch.device] = []

    @contextlib.contextmanager
    def on_device(device: torch.device) -> Iterator[None]:
        current.append(device)
        yield
        current.pop()

    def checking(engine: Engine) -> Any:
        def call(inputs: Sequence[Tensor]) -> Sequence[Tensor]:
            assert current == [eager.engines.device]
            return engine(inputs)

        return call

    monkeypatch.setattr(dispatcher_module, "on_device", on_device)
    variants = [
        replace(each, engines={name: checking(engine) for name, engine in each.engines.items()})
        for each in eager.variants
    ]
    run = replace(eager, engines=replace(eager.engines, variants=tuple(variants))).dispatcher(3)
    for step in range(2):
        run(step=step, **loop_inputs(step, flux_inputs()))
    assert not current
