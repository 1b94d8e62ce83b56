"""New weights for engines that exist: the same as compiling the fine-tuned model anew."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import recache_compile as rc
from recache_compile.errors import ModelError
from tests.compiler.test_build import counted, relative_error
from tests.conftest import NUM_STEPS, compile_flux, flux_inputs, loop_inputs, tiny_flux

TOLERANCE = 1e-6
"""Of float32 matrix products, which may round differently with the alignment of the weights in memory."""


@pytest.fixture(scope="module")
def tuned() -> nn.Module:
    """All weights are others."""
    return tiny_flux(seed=1)


@pytest.fixture(scope="module")
def anew(tuned: nn.Module) -> rc.Compiled:
    with torch.no_grad():
        return compile_flux(tuned)


@pytest.fixture
def loaded(eager_artifact: Path) -> rc.Compiled:
    """Engines with weights of their own."""
    return rc.load(eager_artifact)


def generation(compiled: rc.Compiled, budget: int = 3) -> list[Tensor]:
    run = compiled.dispatcher(budget=budget)
    return [run(step=step, **loop_inputs(step, flux_inputs()))[0] for step in range(NUM_STEPS)]


def assert_same(compiled: rc.Compiled, expected: rc.Compiled, tolerance: float = TOLERANCE) -> None:
    for budget in (3, NUM_STEPS):
        assert max(map(relative_error, generation(compiled, budget), generation(expected, budget))) <= tolerance


def test_refitting_equals_compiling_anew_and_so_does_its_artifact(
    tuned: nn.Module, anew: rc.Compiled, tmp_path: Path
) -> None:
    compiled = compile_flux(tiny_flux())
    before = generation(compiled)
    compiled.refit(tuned.state_dict())
    assert_same(compiled, anew)
    assert min(map(relative_error, generation(compiled), before)) > 0.01
    assert compiled.engines.revision.number == 1
    compiled.save(tmp_path / "artifact")
    assert_same(rc.load(tmp_path / "artifact"), anew)


def test_refitting_a_loaded_artifact_equals_compiling_anew(
    loaded: rc.Compiled, tuned: nn.Module, anew: rc.Compiled
) -> None:
    loaded.refit(tuned.state_dict())
    assert_same(loaded, anew)


@pytest.mark.slow
def test_refitting_inductor_engines_equals_compiling_anew(
    inductor_artifact: Path, tuned: nn.Module, anew: rc.Compiled
) -> None:
    compiled = rc.load(inductor_artifact)
    run = compiled.dispatcher(budget=NUM_STEPS)
    run(step=0, **loop_inputs(0, flux_inputs()))
    compiled.refit(tuned.state_dict())
    this = loop_inputs(1, flux_inputs())
    assert relative_error(run(step=1, **this)[0], tuned(**this, return_dict=False)[0]) <= 1e-5
    assert_same(compiled, anew, tolerance=1e-4)


def test_refitting_twice_equals_refitting_once(loaded: rc.Compiled, tuned: nn.Module, anew: rc.Compiled) -> None:
    loaded.refit(tiny_flux(seed=2).state_dict())
    loaded.refit(tuned.state_dict())
    assert_same(loaded, anew)


def test_a_dispatcher_in_use_sees_new_weights_in_its_next_step(loaded: rc.Compiled, tuned: nn.Module) -> None:
    compiled, calls = counted(loaded)
    run = compiled.dispatcher(budget=NUM_STEPS)
    for step in range(4):
        if step == 2:
            compiled.refit(tuned.state_dict())
        this = loop_inputs(step, flux_inputs())
        result = run(step=step, **this)[0]
    assert relative_error(result, tuned(**this, return_dict=False)[0]) <= TOLERANCE
    assert calls["prologue"] == 2


@pytest.mark.parametrize("part", ["time_text_embed.", "transformer_blocks.0.norm1.", "transformer_blocks.0.attn."])
def test_a_part_of_the_weights_is_replaced_alone(part: str, loaded: rc.Compiled, tuned: nn.Module) -> None:
    """Of the prologue, or of the steps."""
    changes = {name: weight for name, weight in tuned.state_dict().items() if name.startswith(part)}
    expected = tiny_flux()
    expected.load_state_dict(changes, strict=False)
    run = loaded.dispatcher(budget=NUM_STEPS)
    run(step=0, **loop_inputs(0, flux_inputs()))
    loaded.refit(changes, strict=False)
    this = loop_inputs(1, flux_inputs())
    assert relative_error(run(step=1, **this)[0], expected(**this, return_dict=False)[0]) <= TOLERANCE


def test_a_cached_step_sees_the_new_head(loaded: rc.Compiled) -> None:
    run = loaded.dispatcher(budget=3)
    run(step=0, **loop_inputs(0, flux_inputs()))
    loaded.refit({"proj_out.weight": torch.zeros(8, 32), "proj_out.bias": torch.arange(8.0)}, strict=False)
    (result,) = run(step=1, **loop_inputs(1, flux_inputs()))
    assert torch.equal(result, torch.arange(8.0).expand_as(result))


def test_weights_of_another_dtype_are_cast(loaded: rc.Compiled, tuned: nn.Module, anew: rc.Compiled) -> None:
    loaded.refit({name: weight.double() for name, weight in tuned.state_dict().items()})
    assert {weight.dtype for weight in loaded.weights.values()} == {torch.float32}
    assert_same(loaded, anew)


def test_an_artifact_that_was_loaded_and_refitted_can_be_saved(
    loaded: rc.Compiled, tuned: nn.Module, anew: rc.Compiled, tmp_path: Path
) -> None:
    loaded.refit(tuned.state_dict())
    loaded.save(tmp_path / "artifact")
    assert_same(rc.load(tmp_path / "artifact"), anew)


def changed_state(**changes: Any) -> dict[str, Any]:
    """A fine-tune's state with some entries replaced, or removed where they are None."""
    state = {name: weight + 1 for name, weight in tiny_flux().state_dict().items()}
    state |= {name.replace("__", "."): value for name, value in changes.items()}
    return {name: value for name, value in state.items() if value is not None}


@pytest.mark.parametrize(
    ("state", "strict", "message"),
    [
        (changed_state(lora=torch.ones(2)), True, "refit: unknown: lora; nothing was changed"),
        (changed_state(lora=torch.ones(2)), False, "refit: unknown: lora; nothing was changed"),
        (changed_state(proj_out__bias=None), True, "refit: missing: proj_out.bias; nothing was changed"),
        (
            changed_state(proj_out__bias=torch.ones(9)),
            False,
            r"refit: of another shape: proj_out.bias is \[9\], compiled \[8\]; nothing was changed",
        ),
        (
            changed_state(proj_out__bias=torch.ones(8, device="meta")),
            True,
            r"refit: no dense tensor: proj_out\.bias; nothing was changed",
        ),
        ({}, True, r"refit: missing: context_embedder\.bias, .*, .* and \d+ more; nothing"),
    ],
    ids=["unknown", "unknown, not strict", "missing", "shape", "without values", "nothing"],
)
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(
    state: dict[str, Tensor], strict: bool, message: str, loaded: rc.Compiled, eager: rc.Compiled
) -> None:
    with pytest.raises(ModelError, match=message):
        loaded.refit(state, strict=strict)
    assert loaded.engines.revision.number == 0
    assert all(torch.equal(weight, eager.weights[name]) for name, weight in loaded.weights.items())


def test_an_empty_state_is_no_error_where_weights_may_be_missing(loaded: rc.Compiled, eager: rc.Compiled) -> None:
    loaded.refit({}, strict=False)
    assert_same(loaded, eager)


class Odd(nn.Module):
    """Weights that a state dict holds and the graph does not read, and the other way round."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.linear = nn.Linear(4, 4)
        self.tied = self.linear
        self.unused = nn.Linear(2, 2)
        self.register_buffer("shift", torch.randn(4))
        self.register_buffer("positions", torch.arange(4.0), persistent=False)
        self.constant_scale = nn.Parameter(torch.randn(4))

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        made_here = torch.tensor([1.0, 2.0, 3.0, 4.0])
        return self.tied(self.linear(sample)) * timestep + self.shift * made_here + self.more()

    def more(self) -> Tensor:
        return torch.zeros(4)


class Positions(Odd):
    def more(self) -> Tensor:
        return self.positions


class ConstantName(Odd):
    def more(self) -> Tensor:
        return self.constant_scale


@pytest.mark.parametrize(
    "kind",
    [Odd, Positions, ConstantName],
)
@pytest.mark.parametrize("saved", [False, True])
def test_the_state_of_the_same_class_always_fits(kind: type[Odd], saved: bool, tmp_path: Path) -> None:
    """Whatever is tied, made by the code or not part of the state; new values of what is unused are refused."""
    inputs = {"sample": torch.randn(2, 4), "timestep": torch.ones(1)}
    compiled = rc.compile(kind(), inputs, budgets=(2,), num_steps=4, granularity="output", runtime="eager")
    if saved:
        compiled.save(tmp_path / "artifact")
        compiled = rc.load(tmp_path / "artifact")
    run = compiled.dispatcher(budget=2)
    run(step=0, **inputs)
    other = kind(seed=1)
    unread = {"unused.weight", "unused.bias"} | ({"constant_scale"} if kind is not ConstantName else set())
    assert set(compiled.description.unread) == unread
    state = {name: weight for name, weight in other.state_dict().items() if name not in unread}
    for fitting in (state, {**kind().state_dict(), **state}):
        compiled.refit(fitting)
        torch.testing.assert_close(run(step=0, **inputs), other(**inputs))
    compiled.refit({"tied.bias": torch.ones(4)}, strict=False)
    other.linear.bias.data.fill_(1)
    torch.testing.assert_close(run(step=0, **inputs), other(**inputs))
    for wrong, message in (
        (other.state_dict(), r"read by no engine: .*unused.bias, unused.weight \(they read .*; leave the others out\)"),
        (state | {"tied.bias": torch.zeros(4)}, "not equal to what they are tied to: tied.bias"),
    ):
        with pytest.raises(ModelError, match=f"refit: {message}; nothing was changed"):
            compiled.refit(wrong)
        torch.testing.assert_close(run(step=0, **inputs), other(**inputs))


def test_weights_that_were_written_to_reach_the_prologue_with_the_next_generation() -> None:
    """They are shared with the module, and with what else was compiled from it."""
    module, other = tiny_flux(), tiny_flux(seed=1)
    compiled = compile_flux(module)
    run = compiled.dispatcher(NUM_STEPS)
    run(step=0, **flux_inputs())
    module.load_state_dict(other.state_dict())
    expected = other(**flux_inputs(), return_dict=False)[0]
    torch.testing.assert_close(run(step=0, **flux_inputs())[0], expected, atol=TOLERANCE, rtol=TOLERANCE)


def test_what_is_compiled_is_shown_in_a_few_lines(eager: rc.Compiled) -> None:
    first, *rows = repr(eager).splitlines()
    assert first.startswith("Compiled FluxTransformer2DModel: 12 steps, taylor order 1, policy ")
    assert rows == [f"  k = {budget}: {schedule.mask}" for budget, schedule in eager.schedules.items()]
    assert len(repr(eager.engines).splitlines()) == 1


def test_notebooks_show_a_cell_a_step(eager: rc.Compiled) -> None:
    shown = eager._repr_html_()
    assert shown.count("<tr>") == len(eager.schedules)
    (row, *_) = shown.split("<tr>")[1:]
    assert row.count("<span") == NUM_STEPS
