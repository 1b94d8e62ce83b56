"""The prologue's tables where its operators allow any number of rows, and where a call makes one."""

import contextlib
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional

import recache_compile as rc
from recache_compile.errors import DispatchError
from recache_compile.ir.meta import describe_input, describe_outputs
from recache_compile.ir.program import Program
from recache_compile.ir.value import Kind, Value
from recache_compile.runtimes import _tensor_snapshot, dispatcher_tables
from recache_compile.runtimes.base import new_outputs
from recache_compile.runtimes.dispatcher_tables import Tables, Timetable
from tests.compiler.test_build import counted

STEPS = 5


class Mapped(nn.Module):
    """A product with the timestep can be mapped over rows."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.time = nn.Linear(1, 4)
        self.kernel = nn.Parameter(torch.randn(1, 1, 3))

    def forward(self, sample: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        return self.linear(sample) * self.embed(timestep) + context.exp()

    def embed(self, timestep: Tensor) -> Tensor:
        return self.time(timestep.sin()[:, None])


class OneRow(Mapped):
    """A convolution whose padding is a word cannot be mapped over a free number of rows."""

    def embed(self, timestep: Tensor) -> Tensor:
        return functional.conv1d(super().embed(timestep)[:, None], self.kernel, padding="same")[:, 0]


def inputs(step: int, **changes: Any) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(step)
    sample = torch.randn(1, 4, generator=generator)
    return {"sample": sample, "timestep": torch.full((1,), 1 - 0.1 * step), "context": torch.ones(4)} | changes


def compiled(model: nn.Module, known: bool) -> rc.Compiled:
    table = {"timestep": torch.stack([inputs(step)["timestep"] for step in range(STEPS)])} if known else None
    options = {"num_steps": STEPS, "granularity": "output", "runtime": "eager", "timesteps": table}
    return rc.compile(model, inputs(0), budgets=(2, STEPS), **options)


def check(model: nn.Module, run: Any, start: int = 0, **changes: Any) -> None:
    """One generation at full budget, step by step against the model."""
    run.reset(start=start)
    for step in range(start, STEPS):
        given = inputs(step, **changes)
        torch.testing.assert_close(run(step=step, **given), model(**given))


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize(("kind", "calls_a_generation"), [(Mapped, 1), (OneRow, STEPS)])
def test_rows_are_made_once_and_again_when_the_conditioning_changes(
    kind: type[Mapped], calls_a_generation: int, known: bool
) -> None:
    model = kind()
    this, calls = counted(compiled(model, known))
    assert this.variants[0].programs["prologue"].makes_one_row is (kind is OneRow)
    run = this.dispatcher(budget=STEPS)
    check(model, run)
    assert calls["prologue"] == (calls_a_generation if known else STEPS)  # unknown timesteps come one by one
    check(model, run)
    assert calls.pop("prologue") == (calls_a_generation if known else STEPS)
    check(model, run, context=torch.zeros(4))
    assert calls["prologue"] == calls_a_generation


@pytest.mark.parametrize("kind", [Mapped, OneRow])
def test_a_timestep_that_differs_gets_a_row_of_its_own(kind: type[Mapped]) -> None:
    model = kind()
    this, calls = counted(compiled(model, known=True))
    run = this.dispatcher(budget=STEPS)
    check(model, run)
    before = calls["prologue"]
    check(model, run, timestep=torch.full((1,), 0.6))  # the timestep of step 4
    assert calls["prologue"] - before == STEPS - 1


@pytest.mark.parametrize("kind", [Mapped, OneRow])
def test_a_start_in_the_middle_makes_the_rows_from_there(kind: type[Mapped]) -> None:
    model = kind()
    this, calls = counted(compiled(model, known=True))
    check(model, this.dispatcher(budget=STEPS), start=2)
    assert calls["prologue"] == (STEPS - 2 if kind is OneRow else 1)


def test_one_row_at_a_time_costs_what_all_rows_cost() -> None:
    """The embedding of a step is one product of 4; the convolution's 12 come on top."""
    mapped, one_row = (compiled(kind(), known=True).cost(STEPS) for kind in (Mapped, OneRow))
    assert mapped.prologue_macs == STEPS * 4
    assert one_row.prologue_macs == STEPS * (4 + 12)
    assert one_row.table_bytes == mapped.table_bytes


def test_what_belongs_to_which_table_is_told_by_facts_and_not_by_names() -> None:
    """A table's results have as many rows as its own timesteps, whatever they are called."""

    def value(kind: Kind, name: str, table: str) -> Value:
        return Value(name, kind, (None, 4), torch.float32, table=table)

    graph = fx.Graph()
    given = [graph.placeholder(name) for name in "ab"]
    output = graph.output(given[::-1])
    tables = ("first.x@second", "second.x@first")
    for node, name, table in zip(given, ("a@nothing", "b@nothing"), tables, strict=True):
        describe_input(node, value(Kind.TIMESTEP, name, table))
    describe_outputs(output, (value(Kind.TABLE, f"nothing.{table}", table) for table in reversed(tables)))
    program = Program("prologue", fx.GraphModule({}, graph))
    outputs = new_outputs(program, [torch.zeros(2, 4), torch.zeros(5, 4)], torch.device("cpu"))
    assert [tuple(tensor.shape) for tensor in outputs] == [(5, 4), (2, 4)]
    assert not program.makes_one_row


def with_prologue(compiled: rc.Compiled, prologue: Any) -> rc.Compiled:
    variants = [replace(each, engines={**each.engines, "prologue": prologue}) for each in compiled.variants]
    return replace(compiled, engines=replace(compiled.engines, variants=tuple(variants)))


# what a GPU does, on the CPU: nothing is read in the loop


@pytest.fixture
def stalling(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (dispatcher_tables, _tensor_snapshot):
        monkeypatch.setattr(module, "host_waits", lambda tensor: True)


def timetable(factor: float = 1000.0) -> Timetable:
    return Timetable(torch.cat([inputs(step)["timestep"] for step in range(STEPS)]) * factor)


@pytest.mark.usefixtures("stalling")
def test_another_timetable_is_known_from_the_first_step_on() -> None:
    model = Mapped()
    run, changes = compiled(model, known=True).dispatcher(STEPS), {"context": torch.ones(4)}
    for shift in (0.5, 0.5, 1.0, 0.25):
        run.reset(timetable=timetable(1000 * shift))
        for step in range(STEPS):
            given = {**inputs(step), "timestep": inputs(step)["timestep"] * shift, **changes}
            torch.testing.assert_close(run(step=step, **given), model(**given))


@pytest.mark.usefixtures("stalling")
@pytest.mark.parametrize("factor", [1.0, 1000.0])
def test_the_known_timetable_is_recognised_in_its_units(factor: float) -> None:
    compiled_model = compiled(Mapped(), known=True)
    variant, rows = compiled_model.variants[0], []
    engine = variant.engines["prologue"]

    def counting(given: Any) -> Any:
        rows.append(given)
        return engine(given)

    run = with_prologue(compiled_model, counting).dispatcher(STEPS)
    for _ in range(2):
        run.reset(timetable=timetable(factor))
        for step in range(STEPS):
            run(step=step, **inputs(step))
    assert len(rows) == 1


@pytest.mark.usefixtures("stalling")
@pytest.mark.parametrize("inference", [False, True])
def test_conditioning_that_is_written_to_is_noticed_after_the_last_step_at_the_latest(inference: bool) -> None:
    model = Mapped()
    run = compiled(model, known=True).dispatcher(STEPS)
    with torch.inference_mode(inference):
        context = torch.ones(4)

        def generation(write: bool) -> None:
            run.reset()
            for step in range(STEPS):
                given = inputs(step, context=context)
                result = run(step=step, **given)
                if not inference or not write or step < 3:
                    torch.testing.assert_close(result, model(**given))
                if write and step == 2:
                    context.mul_(2.0)

        generation(write=False)
        with pytest.raises(DispatchError, match="written to under way") if inference else contextlib.nullcontext():
            generation(write=True)
        generation(write=False)


@pytest.mark.usefixtures("stalling")
def test_conditioning_that_is_written_to_between_generations_is_new_conditioning() -> None:
    model = Mapped()
    run = compiled(model, known=True).dispatcher(STEPS)
    with torch.inference_mode():
        context = torch.ones(4)
        for value in (1.0, 3.0, 3.0):
            context.fill_(value)
            check(model, run, context=context)


@pytest.mark.usefixtures("stalling")
def test_what_differs_is_told_however_early_a_generation_ends() -> None:
    run = compiled(Mapped(), known=True).dispatcher(STEPS)
    for step in range(2):
        run(step=step, **inputs(step, timestep=torch.full((1,), 0.3)))
    with pytest.raises(DispatchError, match="so its result is wrong"):
        run.finish()
    run.reset()
    for step in range(2):
        run(step=step, **inputs(step))
    run.finish()


def test_a_second_timestep_input_need_not_be_the_schedulers() -> None:
    class Next(Mapped):
        def forward(self, sample: Tensor, timestep: Tensor, sigma: Tensor, context: Tensor) -> Tensor:
            return super().forward(sample, timestep, context) * self.embed(sigma)

    columns = {name: torch.stack([inputs(step)["timestep"] * scale for step in range(STEPS)])
               for name, scale in (("timestep", 1.0), ("sigma", 0.7))}  # fmt: skip
    given = inputs(0) | {"sigma": columns["sigma"][0]}
    options = {"granularity": "output", "runtime": "eager", "timesteps": columns}
    both = rc.compile(Next(), given, budgets=(STEPS,), num_steps=STEPS, **options)
    tables = Tables(both.variants[0], both.plans[STEPS])
    assert tables._fits(timetable())
    assert not tables._fits(timetable(500.0))
