"""Plans without weights agree with what compiling gives."""

import io
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

import recache_compile as rc
from recache_compile.artifact.specs import WeightlessModel, on_meta
from recache_compile.artifact.weightless import PlanFacts, plan_weightless, print_plan
from recache_compile.compiler.examples import Example
from recache_compile.config import CompileConfig
from recache_compile.errors import ModelError
from recache_compile.ir.forecasters import Taylor
from recache_compile.ir.schedule import Schedule
from recache_compile.ir.value import Kind
from recache_compile.models.registry import EMBEDDED
from recache_compile.pipelines.weightless import find_weightless
from tests.conftest import NUM_STEPS, flux_inputs, tiny_flux

CONFIG = CompileConfig(num_steps=NUM_STEPS)
THIRD, EVERY = Schedule((0, 4, 8), NUM_STEPS), Schedule.every(NUM_STEPS)


@pytest.fixture(scope="module")
def planned() -> PlanFacts:
    model = WeightlessModel("tiny", "", NUM_STEPS, tiny_flux().to("meta"), Example(on_meta(flux_inputs())))
    return plan_weightless(model, CONFIG, {3: THIRD, NUM_STEPS: EVERY}, Taylor(1))


def test_a_plan_is_what_compiling_gives(planned: PlanFacts, eager: rc.Compiled) -> None:
    programs = eager.variants[0].programs
    assert {each.name: (each.calls, each.parameters) for each in planned.programs} == {
        name: (program.num_calls, program.num_parameters) for name, program in programs.items()
    }
    for facts in planned.budgets:
        cost = eager.cost(facts.budget)
        assert (facts.macs, facts.history_bytes, facts.table_bytes) == (cost.macs, cost.history_bytes, cost.table_bytes)
    assert planned.call_macs == eager.variants[0].macs
    assert planned.boundary == {value.name: value.nbytes for value in programs["prologue"].outputs}


def test_history_grows_by_an_anchor_with_every_order(planned: PlanFacts, eager: rc.Compiled) -> None:
    stack = next(each for each in planned.sites if each.granularity == "stack")
    (feature,) = (value for value in eager.variants[0].programs["recompute"].outputs if value.kind is Kind.FEATURE)
    assert stack.bytes_per_anchor == feature.nbytes
    assert stack.history_bytes == {order: (order + 1) * feature.nbytes for order in range(4)}


def test_finer_granularities_have_more_sites_and_cost_more_memory(planned: PlanFacts) -> None:
    sites = {each.granularity: each for each in planned.sites}
    assert (sites["output"].sites, sites["stack"].sites) == (1, 1)
    assert sites["block"].sites == 2 * 2 + 3 * 2 - 1  # two streams a block, and nobody reads the last text
    assert sites["module"].sites == 2 * 4 + 3
    assert sites["stack"].bytes_per_anchor < sites["block"].bytes_per_anchor < sites["module"].bytes_per_anchor


def test_a_model_without_such_sites_is_told(tmp_path: Path) -> None:
    class Flat(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(4, 4)

        def forward(self, hidden_states: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            return self.linear(hidden_states) * timestep

    inputs = {"hidden_states": torch.empty(1, 4, device="meta"), "timestep": torch.empty(1, device="meta")}
    model = WeightlessModel("flat", "", NUM_STEPS, Flat().to("meta"), Example(inputs))
    facts = plan_weightless(model, replace(CONFIG, granularity="output"), {3: THIRD}, Taylor(1))
    assert [each.sites for each in facts.sites] == [1, 0, 0, 0]
    assert "no repeated block" in facts.sites[1].reason


def test_the_tables_name_programs_and_budgets(planned: PlanFacts) -> None:
    console = Console(width=160, record=True, file=io.StringIO())
    print_plan(planned, console)
    text = console.export_text()
    for word in ("prologue", "recompute", "forecast", "module", "recompute.row_float32", "MACs"):
        assert word in text


def test_a_pipeline_is_planned_without_the_weights_of_its_transformer(tmp_path: Path) -> None:
    folder = tmp_path / "pipeline"
    shutil.copytree(EMBEDDED["shapes"].weights, folder)
    for file in (folder / "transformer").glob("*.safetensors"):
        file.unlink()
    call = {"prompt": "a red circle left of a blue square on a dark background"}
    bare, whole = find_weightless(str(folder), 4, call), find_weightless("shapes", 4, call)
    assert bare.example.inputs["hidden_states"].device.type == "meta"
    assert bare.example.inputs["hidden_states"].shape == whole.example.inputs["hidden_states"].shape == (1, 64, 48)


def test_unknown_models_are_refused_with_the_names_that_there_are() -> None:
    with pytest.raises(ModelError, match=r"models that come with the package: flux\.1-dev"):
        find_weightless("no-such-model", 4, {})


def test_a_forecast_program_is_told_by_the_step(eager: rc.Compiled) -> None:
    """Its calls make as many steps as a gap has; the head of the model is one product a step."""
    (forecast,) = (each for each in rc.inspect(eager).programs if each.name == "forecast")
    assert forecast.macs == 16 * 32 * 8
