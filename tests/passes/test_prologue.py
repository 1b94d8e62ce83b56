from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from recache_compile.errors import PassError
from recache_compile.ir.meta import Entry, layout_of, set_layout, tensor_of, value_of
from recache_compile.ir.program import Granularity, PassRecord, Program
from recache_compile.ir.value import Kind, Value
from recache_compile.passes.prologue import build_prologue
from tests.passes.tiny import (
    WIDTH,
    Attention,
    Formula,
    Forward,
    Split,
    call,
    example,
    fill_tables,
    read_tables,
    show,
    split,
)

INPUTS = example(Attention())


def timesteps(count: int, like: Tensor = INPUTS["timestep"]) -> Tensor:
    """Different timesteps for `count` rows."""
    rows = torch.arange(1, count + 1).reshape(count, *[1] * like.dim()) * torch.ones(like.shape)
    return (rows * 0.37 if like.is_floating_point() else rows).to(like.dtype)


def assert_rows_equal(parts: Split, module: nn.Module, count: int, inputs: dict[str, Tensor] = INPUTS) -> None:
    """Every row of the tables makes the step compute what the module computes at that timestep."""
    rows = timesteps(count, inputs["timestep"])
    tables = fill_tables(parts.prologue, rows, inputs)
    for number, timestep in enumerate(rows):
        expected = module(**{**inputs, "timestep": timestep})
        packed = read_tables(parts.steps["recompute"], "recompute", tables, number)
        actual = call(parts.steps["recompute"], {**inputs, **packed})["prediction_0"]
        torch.testing.assert_close(actual, expected)


def split_of(forward: Forward, inputs: dict[str, Tensor] = INPUTS) -> tuple[Split, Formula]:
    module = Formula(forward).eval()
    return split(module, granularity=Granularity.OUTPUT, inputs=inputs), module


@pytest.fixture(scope="module")
def attention() -> Split:
    return split(Attention(), patterns=((0,), (2,)))


def forward_of_both(self: Formula, hidden: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
    return hidden * self.linear(context).exp().mean(1) + self.table[:3] * self.time(timestep).tanh()


def test_a_prologue_packs_fixed_values_and_one_row_per_timestep() -> None:
    def forward(self: Formula, hidden: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        return self.linear(hidden) * (timestep.sin() * self.table.sum()) + context.cos()[:, :1]

    parts, module = split_of(forward)
    assert (
        show(parts.prologue).replace("mul_1", "mul")  # torch releases number the product differently
        == """\
arguments_0: timestep rowsx1
arguments_1: conditioning 1x2x4
fixed_part_table: weight table
sum_1 = aten.sum.default(fixed_part_table)
cos = aten.cos.default(arguments_1)
sin = aten.sin.default(arguments_0)
mul = aten.mul.Tensor(sin, sum_1)
pad = aten.pad.default(mul, [0, 63])
cat = aten.cat.default([pad], 1)
view = aten.reshape.default(cos, [8])
pad_1 = aten.pad.default(view, [0, 56])
cat_1 = aten.cat.default([pad_1])
return [cat, cat_1]"""
    )
    assert_rows_equal(parts, module, 3)


def test_inputs_and_results_are_described(attention: Split) -> None:
    assert attention.prologue.inputs == (
        Value("timestep@recompute", Kind.TIMESTEP, (None, 1), torch.float32, table="recompute", source="timestep"),
        Value("timestep@forecast", Kind.TIMESTEP, (None, 1), torch.float32, table="forecast", source="timestep"),
        Value("encoder_hidden_states", Kind.CONDITIONING, (1, 2, WIDTH), torch.float32),
    )
    assert attention.prologue.outputs == (
        Value("recompute.row_float32", Kind.TABLE, (None, 192), torch.float32, table="recompute", source="row_float32"),
        Value("recompute.fixed_float32", Kind.FIXED, (256,), torch.float32, table="recompute", source="fixed_float32"),
        Value("forecast.row_float32", Kind.TABLE, (None, 64), torch.float32, table="forecast", source="row_float32"),
    )
    assert attention.prologue.provenance[-1] == PassRecord("build-prologue")


@pytest.mark.parametrize("count", [2, 3, 4, 9])
def test_any_number_of_rows_from_two_equals_the_model(attention: Split, count: int) -> None:
    assert_rows_equal(attention, Attention(), count)


def test_results_have_the_described_shapes(attention: Split) -> None:
    tables = fill_tables(attention.prologue, timesteps(5), INPUTS)
    for value in attention.prologue.outputs:
        assert tables[value.name].shape == tuple(5 if size is None else size for size in value.shape)


def test_tables_may_have_different_numbers_of_rows(attention: Split) -> None:
    few, many = timesteps(2), timesteps(6)
    tables = call(attention.prologue, {**INPUTS, "timestep@recompute": few, "timestep@forecast": many})
    assert [len(tables[f"{name}.row_float32"]) for name in ("recompute", "forecast")] == [2, 6]
    alone = fill_tables(attention.prologue, many, INPUTS)
    torch.testing.assert_close(tables["forecast.row_float32"], alone["forecast.row_float32"])


def test_the_padding_between_values_is_zero(attention: Split) -> None:
    tables = fill_tables(attention.prologue, timesteps(2), INPUTS)
    for node in attention.steps["recompute"].module.graph.find_nodes(op="placeholder"):
        packed = tables.get(f"recompute.{value_of(node).name}")
        for entry in layout_of(node):
            end = entry.offset + torch.Size(entry.shape).numel()
            assert packed[..., end : -(-end // 64) * 64].count_nonzero() == 0


def test_a_cached_step_reads_its_own_table(attention: Split) -> None:
    module, step = Attention(), attention.steps["forecast"]
    tables = fill_tables(attention.prologue, timesteps(3), INPUTS)
    held = {f"history_0_{slot}": torch.randn(1, 3, WIDTH) for slot in range(2)}
    packed = read_tables(step, "forecast", tables, 2)
    actual = call(step, {**held, **packed, "coefficients": torch.tensor([2.0, -1.0])})["prediction_0"]
    embedding = module.time(timesteps(3)[2][:, None])
    expected = module.out(2 * held["history_0_0"] - held["history_0_1"] + embedding[:, None])
    torch.testing.assert_close(actual, expected)


def test_prologue_and_steps_share_no_weight_and_read_all_of_them(attention: Split) -> None:
    prologue, step = set(attention.prologue.weights), set(attention.steps["recompute"].weights)
    assert not prologue & step
    assert prologue | step == {name for name, _ in Attention().named_parameters()}
    whole = attention.annotated.weights
    assert all(weight.data_ptr() == whole[name].data_ptr() for name, weight in attention.prologue.weights.items())


def test_other_conditioning_makes_other_tables(attention: Split) -> None:
    other = {**INPUTS, "encoder_hidden_states": INPUTS["encoder_hidden_states"] + 1}
    assert_rows_equal(attention, Attention(), 2, other)


def test_what_all_rows_share_is_computed_once() -> None:
    def forward(self: Formula, hidden: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        return hidden + (self.linear(context).mean(1) * self.embed(timestep)).exp()

    parts, module = split_of(forward)
    assert_rows_equal(parts, module, 5)
    shared = [node for node in parts.prologue.module.graph.nodes if "mean" in str(node.target)]
    assert [tuple(tensor_of(node).shape) for node in shared] == [(1, WIDTH)]


ROWS: dict[str, Forward] = {
    "cat": lambda self, hidden, t, context: hidden + torch.cat([self.embed(t)[:, :2], self.embed(t)[:, :2].cos()], -1),
    "cat with fixed part": lambda self, hidden, t, context: (
        hidden + torch.cat([context[:, 0, :2], self.embed(t)[:, 2:]], -1).exp()
    ),
    "cat of rows": lambda self, hidden, t, context: hidden + torch.cat([self.embed(t)[:, None], context], 1),
    "concat": lambda self, hidden, t, context: (
        hidden + torch.concat([self.embed(t)[:, :2], context[:, 0, 2:]], -1).exp()
    ),
    "index_select of rows": lambda self, hidden, t, context: (
        hidden + self.embed(t).exp().index_select(-1, torch.tensor([3, 1, 0, 0]))
    ),
    "index_select by rows": lambda self, hidden, t, context: (
        hidden + context.index_select(1, (t > 2).long()) * self.linear.weight.index_select(0, (t > 2).long())
    ),
    "layer_norm": lambda self, hidden, t, context: hidden + self.norm(self.embed(t)),
    "layer_norm without weights": lambda self, hidden, t, context: (
        hidden + functional.layer_norm(self.embed(t), (WIDTH,), eps=1e-6)
    ),
    "layer_norm of fixed part": lambda self, hidden, t, context: (
        hidden + self.norm(context).mean(1) * self.embed(t).exp()
    ),
    "stack": lambda self, hidden, t, context: hidden * torch.stack([self.embed(t), self.embed(t).cos()], 0).prod(0),
    "rms_norm": lambda self, hidden, t, context: hidden + functional.rms_norm(self.embed(t), (WIDTH,)),
    "chunk and silu": lambda self, hidden, t, context: hidden[..., :2] * functional.silu(self.embed(t)).chunk(2, -1)[1],
    "matmul": lambda self, hidden, t, context: hidden + (self.embed(t) @ self.table[:4]).sin(),
    "sum over rows of conditioning": lambda self, hidden, t, context: (
        hidden + torch.einsum("bd,bnd->bn", self.embed(t), context).sum(-1, keepdim=True)
    ),
    "softmax": lambda self, hidden, t, context: hidden * self.embed(t).softmax(-1),
    "where": lambda self, hidden, t, context: hidden * torch.where(t[:, None] > 0.5, self.embed(t), self.table[:1]),
    "timestep itself": lambda self, hidden, t, context: self.linear(hidden) * t + self.embed(t).sin(),
    "bfloat16": lambda self, hidden, t, context: hidden * self.embed(t).bfloat16().exp() + self.embed(t).exp(),
    "half and complex": lambda self, hidden, t, context: torch.view_as_real(
        torch.view_as_complex(hidden.unflatten(-1, (2, 2))) * torch.polar(self.embed(t).exp(), self.embed(t))[:, :2]
    ).flatten(2),
}


@pytest.mark.parametrize("forward", ROWS.values(), ids=ROWS.keys())
def test_operators_on_the_timestep_map_over_any_number_of_rows(forward: Forward) -> None:
    parts, module = split_of(forward)
    for count in (2, 5):
        assert_rows_equal(parts, module, count)


def test_an_integer_timestep_that_indexes_a_table_maps_over_rows() -> None:
    inputs = {**INPUTS, "timestep": torch.tensor([3])}
    parts, module = split_of(lambda self, hidden, timestep, context: hidden + self.table[timestep], inputs)
    assert_rows_equal(parts, module, 5, inputs)


def test_a_batch_with_its_own_timesteps_maps_over_rows() -> None:
    module = Attention().eval()
    inputs = {name: torch.cat([value, 2 * value]) for name, value in INPUTS.items()}
    assert_rows_equal(split(module, inputs=inputs), module, 4, inputs)


def test_without_a_timestep_there_are_fixed_tables_only() -> None:
    parts, module = split_of(lambda self, hidden, timestep, context: hidden + self.linear(context).mean(1))
    assert [value.name for value in parts.prologue.inputs] == ["encoder_hidden_states"]
    assert [value.name for value in parts.prologue.outputs] == ["recompute.fixed_float32"]
    assert_rows_equal(parts, module, 2)


def test_with_nothing_to_hoist_the_prologue_is_empty() -> None:
    parts, _ = split_of(lambda self, hidden, timestep, context: self.linear(hidden))
    assert (parts.prologue.inputs, parts.prologue.outputs) == ((), ())


def test_conditioning_that_no_table_needs_is_no_input() -> None:
    parts, module = split_of(lambda self, hidden, timestep, context: hidden * self.embed(timestep).sin())
    assert [value.name for value in parts.prologue.inputs] == ["timestep@recompute"]
    assert_rows_equal(parts, module, 3)


def test_the_annotated_program_and_the_steps_stay_as_they_were() -> None:
    parts, _ = split_of(forward_of_both)
    before = [show(program) for program in (parts.annotated, *parts.steps.values())]
    build_prologue(parts.annotated, parts.steps)
    assert [show(program) for program in (parts.annotated, *parts.steps.values())] == before


def test_a_value_that_the_model_does_not_compute_is_refused(attention: Split) -> None:
    step = attention.steps["recompute"]
    foreign = Program("recompute", torch.fx.GraphModule(step.module, _with_entry(step, Entry(-1, 0, (4,)))))
    message = "build-prologue: recompute reads 1 values of row_float32 that capture does not compute"
    with pytest.raises(PassError, match=message):
        build_prologue(attention.annotated, {"recompute": foreign})


def _with_entry(step: Program, entry: Entry) -> torch.fx.Graph:
    """The step's graph with the layout of its packed inputs replaced."""
    graph = torch.fx.Graph()
    graph.output(graph.graph_copy(step.module.graph, {}))
    for node in graph.find_nodes(op="placeholder"):
        if layout_of(node):
            set_layout(node, (entry,))
    return graph


def test_a_prologue_without_weights_keeps_the_order_of_its_inputs() -> None:
    parts, module = split_of(
        lambda self, hidden, timestep, context: self.linear(hidden) + timestep.sin()[:, None] * context.cos()[:, :1]
    )
    assert_rows_equal(parts, module, 3)


@pytest.mark.parametrize("shape", [(), (1,)], ids=["timestep", "value"])
def test_scalars_map_over_rows(shape: tuple[int, ...]) -> None:
    inputs = {**INPUTS, "timestep": torch.full(shape, 0.7)}
    parts, module = split_of(
        lambda self, hidden, timestep, context: self.linear(hidden) * (self.table * timestep).sum(), inputs
    )
    assert_rows_equal(parts, module, 3, inputs)


@pytest.mark.parametrize(
    "attend",
    [
        lambda self, embedding, context: (embedding[:, None], context, context),
        lambda self, embedding, context: (context * embedding[:, None],) * 3,
    ],
    ids=["query per row", "everything per row"],
)
def test_attention_on_the_timestep_maps_over_rows(attend: Callable[..., tuple[Tensor, Tensor, Tensor]]) -> None:
    def forward(self: Formula, hidden: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        attended = functional.scaled_dot_product_attention(*attend(self, self.embed(timestep), context))
        return hidden + attended[:, :1]

    parts, module = split_of(forward)
    for count in (2, 5):
        assert_rows_equal(parts, module, count)


def forward_of_one_row(self: Formula, hidden: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
    kernel = self.table[:1, None, :3]
    mixed = functional.conv1d(self.embed(timestep)[:, None], kernel, padding=1)
    return hidden + mixed.exp() + self.linear(context).mean(1)


def test_where_an_operator_cannot_be_mapped_a_call_makes_one_row() -> None:
    parts, module = split_of(forward_of_one_row)
    assert [(value.name, value.shape) for value in parts.prologue.inputs] == [
        ("timestep@recompute", (1, 1)),
        ("encoder_hidden_states", (1, 2, WIDTH)),
    ]
    assert [(value.name, value.shape) for value in parts.prologue.outputs] == [
        ("recompute.row_float32", (1, 64)),
        ("recompute.fixed_float32", (64,)),
    ]
    assert parts.prologue.makes_one_row
    assert_rows_equal(parts, module, 1)


def test_several_tables_of_one_row() -> None:
    module = Formula(forward_of_one_row).eval()
    parts = split(module, ((0,), (2,)), Granularity.OUTPUT)
    assert [value.shape for value in parts.prologue.inputs if value.kind is Kind.TIMESTEP] == [(1, 1)]
    assert_rows_equal(parts, module, 1)


def test_with_a_free_number_of_rows_a_call_makes_them_all(attention: Split) -> None:
    assert not attention.prologue.makes_one_row
    fixed, _ = split_of(lambda self, hidden, timestep, context: hidden + self.linear(context).mean(1))
    assert not fixed.prologue.makes_one_row


def test_work_on_weights_alone_needs_no_input() -> None:
    parts, module = split_of(lambda self, hidden, timestep, context: hidden * self.linear(self.table[:3]).exp())
    assert parts.prologue.inputs == ()
    assert [value.name for value in parts.prologue.outputs] == ["recompute.fixed_float32"]
    assert_rows_equal(parts, module, 2)


def test_a_model_without_other_inputs_has_a_prologue_without_inputs() -> None:
    class Alone(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(3, WIDTH))

        def forward(self, hidden_states: Tensor) -> Tensor:
            return hidden_states * self.table.exp()

    module, inputs = Alone(), {"hidden_states": INPUTS["hidden_states"]}
    parts = split(module, granularity=Granularity.OUTPUT, inputs=inputs)
    assert parts.prologue.inputs == ()
    packed = read_tables(parts.steps["recompute"], "recompute", call(parts.prologue, {}), 0)
    torch.testing.assert_close(call(parts.steps["recompute"], {**inputs, **packed})["prediction_0"], module(**inputs))


def test_what_cannot_be_exported_is_refused_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no such operator\nand more")

    monkeypatch.setattr("recache_compile.passes.prologue.export_module", fail)
    with pytest.raises(
        PassError, match=r"build-prologue: .*\(no such operator\); compile without hoisting: hoist=False"
    ):
        split_of(forward_of_both)


def test_an_export_that_is_known_to_fail_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without rows there is nothing that a call could make one of."""
    tried = []

    def fail(*_: object, **__: object) -> None:
        tried.append(None)
        raise RuntimeError("no such operator")

    monkeypatch.setattr("recache_compile.passes.prologue.export_module", fail)
    with pytest.raises(PassError, match="cannot be exported"):
        split_of(lambda self, hidden, timestep, context: hidden + self.linear(context).mean(1))
    assert len(tried) == 1


def test_why_rows_are_made_one_by_one_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("DEBUG", "recache_compile.passes.prologue"):
        split_of(forward_of_one_row)
    assert "rows are made one by one" in caplog.text
