"""Equality with the original and with an independent reference; the structure of the programs."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import recache_compile as rc
from recache_compile.compiler.build import Example, distinct
from recache_compile.errors import RecacheError
from recache_compile.ir.forecasters import get_forecaster
from recache_compile.ir.schedule import Schedule
from recache_compile.ir.value import Kind
from recache_compile.policies.base import Problem
from tests.conftest import NUM_STEPS, RUNTIMES, compile_flux, flux_inputs, loop_inputs, timesteps, tiny_flux
from tests.reference import CachedReference

LATENTS = ("hidden_states",)


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


@pytest.mark.parametrize(
    ("runtime", "tolerance"),
    [
        ("eager", 1e-6),
        pytest.param("inductor", 1e-5, marks=pytest.mark.slow),
        pytest.param("onnxruntime", 1e-5, marks=pytest.mark.slow),
    ],
)
def test_full_budget_reproduces_the_original_call_by_call(
    runtime: str, tolerance: float, flux: torch.nn.Module, request: pytest.FixtureRequest
) -> None:
    run = request.getfixturevalue(runtime).dispatcher(budget=NUM_STEPS)
    for step in range(NUM_STEPS):
        inputs = loop_inputs(step, flux_inputs())
        with torch.compiler.set_stance("fail_on_recompile"):
            (ours,) = run(step=step, **inputs)
        assert relative_error(ours, flux(**inputs, return_dict=False)[0]) <= tolerance


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_small_budget_equals_the_hooked_model_call_by_call(
    runtime: str, flux: torch.nn.Module, request: pytest.FixtureRequest
) -> None:
    compiled = request.getfixturevalue(runtime)
    reference = CachedReference(flux, flux_inputs(), LATENTS, compiled.schedules[3].recompute_steps)
    run = compiled.dispatcher(budget=3)
    for step in range(NUM_STEPS):
        inputs = loop_inputs(step, flux_inputs())
        assert relative_error(run(step=step, **inputs)[0], reference(step, **inputs)[0]) <= 1e-4


@pytest.fixture(scope="module")
def deep(flux: torch.nn.Module) -> rc.Compiled:
    """Programs for up to four anchors: enough for every forecaster below."""
    return compile_flux(flux, budgets=(6,), forecaster="taylor", order=3)


@pytest.mark.parametrize(
    ("forecaster", "order"), [("reuse", 0), ("taylor", 2), ("taylor", 3), ("hicache", 1), ("hicache", 2), ("newton", 2)]
)
def test_another_forecaster_is_another_table_for_the_same_engines(
    forecaster: str, order: int, flux: torch.nn.Module, deep: rc.Compiled
) -> None:
    schedule = Schedule((0, 1, 3, 4, 7, 9), NUM_STEPS)
    run = deep.engines.with_plans({6: schedule}, get_forecaster(forecaster, order)).dispatcher(budget=6)
    reference = CachedReference(flux, flux_inputs(), LATENTS, schedule.recompute_steps, forecaster, order)
    for step in range(NUM_STEPS):
        inputs = loop_inputs(step, flux_inputs())
        assert relative_error(run(step=step, **inputs)[0], reference(step, **inputs)[0]) <= 1e-4


def test_output_granularity_forecasts_the_prediction(flux: torch.nn.Module) -> None:
    compiled = compile_flux(flux, budgets=(3,), granularity="output", forecaster="taylor", order=1)
    run, schedule = compiled.dispatcher(budget=3), compiled.schedules[3]
    anchors: list[tuple[int, Tensor]] = []
    for step in range(NUM_STEPS):
        inputs = loop_inputs(step, flux_inputs())
        (ours,) = run(step=step, **inputs)
        if step in schedule.recompute_steps:
            anchors.append((step, flux(**inputs, return_dict=False)[0]))
            expected = anchors[-1][1]
        elif len(anchors) == 1:
            expected = anchors[0][1]
        else:
            (older, before), (newer, after) = anchors[-2:]
            expected = after + (step - newer) * (after - before) / (newer - older)
        assert relative_error(ours, expected) <= 1e-5


def test_without_hoisting_the_results_are_the_same(flux: torch.nn.Module, eager: rc.Compiled) -> None:
    compiled = compile_flux(flux, hoist=False)
    assert "prologue" not in compiled.variants[0].programs
    with_hoist, without = eager.dispatcher(budget=3), compiled.dispatcher(budget=3)
    for step in range(NUM_STEPS):
        inputs = loop_inputs(step, flux_inputs())
        assert relative_error(without(step=step, **inputs)[0], with_hoist(step=step, **inputs)[0]) <= 1e-5


class CountingEngine:
    def __init__(self, name: str, engine: Any, calls: Counter[str]) -> None:
        self.name, self.engine, self.calls = name, engine, calls

    def __call__(self, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        self.calls[self.name] += 1
        return self.engine(inputs)


def counted(compiled: rc.Compiled) -> tuple[rc.Compiled, Counter[str]]:
    """The same compiled model with engines that count their calls."""
    calls: Counter[str] = Counter()
    variants = tuple(
        replace(each, engines={name: CountingEngine(name, engine, calls) for name, engine in each.engines.items()})
        for each in compiled.variants
    )
    return replace(compiled, engines=replace(compiled.engines, variants=variants)), calls


def test_one_engine_call_per_recompute_step_and_gap_plus_one_prologue(eager: rc.Compiled) -> None:
    compiled, calls = counted(eager)
    run = compiled.dispatcher(budget=3)
    for step in range(NUM_STEPS):
        before = calls.total()
        run(step=step, **loop_inputs(step, flux_inputs()))
        assert calls.total() - before == {0: 2, 1: 1, 4: 1, 5: 1, 8: 1, 9: 1}.get(step, 0)
    assert calls == {"prologue": 1, "recompute": 3, "forecast": 3}


def test_cached_step_holds_no_block_weight(eager: rc.Compiled) -> None:
    programs = eager.variants[0].programs
    assert set(programs["forecast"].weights) == {"proj_out.weight", "proj_out.bias"}
    assert programs["forecast"].num_calls <= 30
    assert "hidden_states" not in [value.name for value in programs["forecast"].inputs]


def test_prologue_and_step_programs_share_no_weight_and_lose_none(flux: torch.nn.Module, eager: rc.Compiled) -> None:
    programs = dict(eager.variants[0].programs)
    prologue = set(programs.pop("prologue").weights)
    steps = set().union(*(program.weights for program in programs.values()))
    assert not prologue & steps
    assert prologue | steps >= {name for name, _ in flux.named_parameters()}


def test_weights_are_the_modules_own_tensors(flux: torch.nn.Module, eager: rc.Compiled) -> None:
    parameters = dict(flux.named_parameters())
    assert all(eager.weights[name].data_ptr() == parameters[name].data_ptr() for name in parameters)


def test_recompute_returns_the_feature_of_every_site(eager: rc.Compiled) -> None:
    values = eager.variants[0].programs["recompute"].outputs
    assert [value.kind for value in values] == [Kind.PREDICTION, Kind.FEATURE]
    assert values[1].shape == (1, 16, 32)


def test_budgets_share_all_programs(flux: torch.nn.Module) -> None:
    compiled = compile_flux(flux, budgets=(2, 3, 5, 7))
    assert set(compiled.variants[0].programs) == {"prologue", "recompute", "forecast"}


@pytest.mark.parametrize(("num_steps", "order", "most"), [(12, 3, 4), (12, 0, 1), (3, 3, 4), (1, 1, 2)])
def test_there_is_one_forecast_from_as_many_anchors_as_the_forecaster_reads(
    num_steps: int, order: int, most: int
) -> None:
    """Whatever the budgets, schedules and numbers of steps: engines know none."""
    options = {"num_steps": num_steps, "forecaster": "newton", "order": order, "runtime": "eager"}
    compiled = rc.compile(Choice(), {"sample": torch.ones(2, 4)}, budgets=(1,), **options)
    programs = compiled.variants[0].programs
    assert set(programs) == {"recompute", "forecast"}
    assert [value.shape for value in programs["forecast"].inputs if value.name == "coefficients"] == [(None, most)]


def test_several_shapes_share_weights_and_keep_apart(flux: torch.nn.Module) -> None:
    examples = [flux_inputs(batch=1), flux_inputs(batch=2)]
    compiled = rc.compile(flux, examples, budgets=(3,), num_steps=NUM_STEPS, runtime="eager")
    assert sum(weight.numel() for weight in compiled.weights.values()) == sum(p.numel() for p in flux.parameters())
    run = compiled.dispatcher(budget=3)
    references = [
        CachedReference(flux, example, LATENTS, compiled.schedules[3].recompute_steps) for example in examples
    ]
    for step in range(NUM_STEPS):
        for example, reference in zip(examples, references, strict=True):
            inputs = loop_inputs(step, example)
            assert relative_error(run(step=step, **inputs)[0], reference(step, **inputs)[0]) <= 1e-4


def test_bfloat16_forecast_is_accumulated_in_float32() -> None:
    module = tiny_flux().to(torch.bfloat16)
    inputs = {name: value.to(torch.bfloat16) for name, value in flux_inputs().items()}
    compiled = rc.compile(module, inputs, budgets=(3,), num_steps=NUM_STEPS, granularity="output", runtime="eager")
    run = compiled.dispatcher(budget=3)
    anchors = []
    for step in range(6):
        this = {**inputs, "timestep": timesteps()[step].to(torch.bfloat16)}
        (ours,) = run(step=step, **this)
        if step in (0, 4):
            anchors.append(ours.float())
    expected = anchors[1] + (anchors[1] - anchors[0]) * (1 / 4)
    assert torch.equal(ours, expected.to(torch.bfloat16)) or relative_error(ours.float(), expected) <= 2**-8


class WrongPolicy:
    def schedule(self, problem: Problem, budget: int) -> Schedule:
        return Schedule((0, 1), problem.num_steps)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budgets": (0,)}, "budget 0"),
        ({"budgets": (13,)}, "expected 1..12"),
        ({"granularity": "layer"}, "granularity 'layer' is unknown; choose output, stack, block, module"),
        ({"forecaster": "magic"}, "forecaster 'magic' is unknown"),
        ({"policy": "magic"}, "policy 'magic' is neither"),
        ({"policy": {3: (1, 2, 3)}}, "step 0 is missing"),
        ({"policy": WrongPolicy()}, "for budget 3"),
        ({"runtime": "magic"}, "runtime 'magic' is unknown"),
        ({"roles": {"guidanze": "latents"}}, r"\['guidanze'\] are no tensor inputs"),
        ({"roles": {"guidance": "noise"}}, "'noise' for 'guidance' is no role"),
    ],
)
def test_unusable_options_are_refused(options: dict[str, Any], message: str, flux: torch.nn.Module) -> None:
    with pytest.raises(RecacheError, match=message):
        compile_flux(flux, **{"budgets": (3,), **options})


def test_a_module_needs_example_inputs(flux: torch.nn.Module) -> None:
    with pytest.raises(RecacheError, match="needs example_inputs"):
        rc.compile(flux)


def test_a_timetable_of_another_length_is_refused(flux: torch.nn.Module) -> None:
    with pytest.raises(RecacheError, match=r"shape \(12, 1\), expected \(num_steps, \*shape\) = \(10, 1\)"):
        rc.compile(flux, flux_inputs(), budgets=(3,), num_steps=10, timesteps={"timestep": timesteps()})


class Choice(torch.nn.Module):
    """Another number of results, or of sites, where a constant says so."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList([torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)])

    def forward(self, sample: Tensor, both: bool = False, wide: bool = False) -> tuple[Tensor, ...]:
        first = self.blocks[0](sample)
        results = (first + self.blocks[1](first),) if wide else (self.blocks[1](first),)
        return results + results * both


@pytest.mark.parametrize(
    ("change", "message"),
    [({"both": True}, "returns another structure"), ({"wide": True}, "one has 2 cache sites, the first has 1")],
)
def test_examples_that_differ_in_results_or_sites_are_refused(change: dict[str, bool], message: str) -> None:
    one = {"sample": torch.ones(2, 4)}
    with pytest.raises(RecacheError, match=message):
        rc.compile(Choice(), [one, one | change], budgets=(2,), num_steps=4, runtime="eager")


def test_no_example_at_all_is_refused(flux: torch.nn.Module) -> None:
    with pytest.raises(RecacheError, match="example_inputs is empty"):
        rc.compile(flux, [], budgets=(3,), num_steps=NUM_STEPS)


def test_examples_of_one_kind_are_one() -> None:
    one = {"sample": torch.ones(2, 4), "more": [torch.ones(1), None]}
    same = {"sample": torch.zeros(2, 4), "more": [torch.zeros(1), None]}
    others = [
        one | {"sample": torch.ones(3, 4)},
        one | {"sample": torch.ones(2, 4, dtype=torch.bfloat16)},
        one | {"more": [torch.ones(1), 1.0]},
        {"sample": torch.ones(2, 4)},
    ]
    examples = [Example(inputs, {}, {}) for inputs in (one, same, *others, one)]
    kinds = distinct(examples)
    assert [id(each.inputs) for each in kinds] == [id(examples[at].inputs) for at in (0, 2, 3, 4, 5)]
    assert [id(each) for each in kinds[0].others] == [id(same), id(one)]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"timestep": timesteps(batch=2)}, "expected .num_steps"),
        ({"timestepp": timesteps()}, "'timestepp' is no timestep input; these are: timestep"),
    ],
)
def test_a_timetable_that_does_not_fit_is_refused(
    table: dict[str, Tensor], message: str, flux: torch.nn.Module
) -> None:
    with pytest.raises(RecacheError, match=message):
        rc.compile(flux, flux_inputs(), budgets=(3,), num_steps=NUM_STEPS, timesteps=table, runtime="eager")


def test_a_timetable_of_another_dtype_is_converted(flux: torch.nn.Module) -> None:
    compiled = rc.compile(
        flux,
        flux_inputs(),
        budgets=(3,),
        num_steps=NUM_STEPS,
        timesteps={"timestep": timesteps().double()},
        runtime="eager",
    )
    assert compiled.variants[0].timesteps["timestep"].dtype == torch.float32


def test_casting_the_module_afterwards_changes_nothing() -> None:
    module = tiny_flux()
    compiled = compile_flux(module, budgets=(3,))
    this = loop_inputs(0, flux_inputs())
    expected = module(**this, return_dict=False)[0]
    module.double()
    assert relative_error(compiled.dispatcher(budget=3)(step=0, **this)[0], expected) <= 1e-6
