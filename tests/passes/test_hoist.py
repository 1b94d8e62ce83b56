from math import prod

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx
from torch.nn import functional

from recache_compile.errors import PassError
from recache_compile.ir.meta import (
    Entry,
    by_origin,
    is_kept_in_step,
    layout_of,
    number_nodes,
    origin_of,
    set_result,
    value_of,
)
from recache_compile.ir.program import Granularity, Program, SitePattern
from recache_compile.ir.value import Kind, Value
from recache_compile.passes.base import PassResult, run_passes
from recache_compile.passes.binding_times import binding_times
from recache_compile.passes.hoist import ALIGNMENT, Hoist, boundary, layout, padded
from recache_compile.passes.ops import is_random
from recache_compile.passes.simplify import Simplify
from recache_compile.passes.specialise import Specialise
from tests.passes.tiny import Attention, Formula, Forward, Plain, annotated, aten, call, example, show

INPUTS = example(Attention())


def specialised(
    module: torch.nn.Module, pattern: SitePattern = (0,), granularity: Granularity = Granularity.OUTPUT
) -> Program:
    return run_passes(annotated(module, granularity), (Specialise(pattern),))


def hoisted(forward: Forward) -> tuple[Program, PassResult]:
    program = specialised(Formula(forward))
    return program, Hoist()(program)


class Record(fx.Interpreter):
    """Runs a graph and keeps every value by the origin of its node."""

    def __init__(self, program: Program) -> None:
        super().__init__(program.module)
        self.values: dict[int | None, Tensor] = {}

    def run_node(self, n: fx.Node) -> object:
        self.values[origin_of(n)] = super().run_node(n)
        return self.values[origin_of(n)]


def pack(step: Program, values: dict[int | None, Tensor]) -> dict[str, Tensor]:
    """The packed inputs of a step, filled from the values of the nodes that were hoisted."""
    packed = {}
    for node in step.module.graph.find_nodes(op="placeholder"):
        if layout_of(node):
            value = value_of(node)
            packed[value.name] = torch.full(value.shape, 7).to(value.dtype)
            for entry in layout_of(node):
                part = values[entry.node].reshape(-1)
                packed[value.name][entry.offset : entry.offset + len(part)] = part
    return packed


def assert_same(program: Program, step: Program, inputs: dict[str, Tensor] = INPUTS) -> None:
    """A hoisted step on hand-packed inputs computes what it computed before."""
    record = Record(program)
    expected = record.run(*(inputs[value.name] for value in program.inputs))
    results = call(step, {**inputs, **pack(step, record.values)})
    for result, value in zip(results.values(), expected, strict=True):
        assert torch.equal(result, value)


def packed_inputs(program: Program) -> dict[str, tuple[int | None, ...]]:
    return {value.name: value.shape for value in program.inputs if value.kind in (Kind.TABLE_ROW, Kind.FIXED)}


def nodes_of(shapes: list[tuple[int, ...]]) -> list[fx.Node]:
    graph = fx.Graph()
    nodes = [graph.placeholder(f"value_{number}") for number in range(len(shapes))]
    for node, shape in zip(nodes, shapes, strict=True):
        set_result(node, torch.empty(shape, device="meta"))
    number_nodes(graph)
    return nodes


SHAPES = st.lists(st.lists(st.integers(0, 9), max_size=4).map(tuple), max_size=12)


@given(SHAPES)
def test_entries_are_aligned_never_overlap_and_fill_the_size(shapes: list[tuple[int, ...]]) -> None:
    nodes = nodes_of(shapes)
    entries, size = layout(nodes)
    assert [(entry.node, entry.shape) for entry in entries] == [
        (origin_of(node), shape) for node, shape in zip(nodes, shapes, strict=True)
    ]
    end = 0
    for entry in entries:
        assert entry.offset % ALIGNMENT == 0
        assert end <= entry.offset < end + ALIGNMENT
        end = entry.offset + prod(entry.shape)
    assert end <= size < end + ALIGNMENT
    assert size % ALIGNMENT == 0


@given(st.integers(0, 10**12))
def test_padding_is_the_next_multiple(size: int) -> None:
    assert padded(size) % ALIGNMENT == 0
    assert 0 <= padded(size) - size < ALIGNMENT


def test_known_layout() -> None:
    nodes = nodes_of([(2, 3), (), (65,), (64,)])
    first, second, third, fourth = map(origin_of, nodes)
    assert layout(nodes) == (
        (
            Entry(first, 0, (2, 3)),
            Entry(second, 64, ()),
            Entry(third, 128, (65,)),
            Entry(fourth, 256, (64,)),
        ),
        320,
    )


def test_a_step_reads_its_independent_values_from_packed_inputs() -> None:
    def forward(self: Formula, hidden: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        return hidden * self.embed(timestep) + context.mean(1)

    program, result = hoisted(forward)
    assert result.modified
    assert (
        show(run_passes(result.program, (Simplify(),)))
        == """\
hidden_states: latents 1x3x4
row_float32: row 64
fixed_float32: fixed 64
slice_tensor_1 = aten.slice.Tensor(fixed_float32, 0, 0, 4)
view_default_1 = aten.view.default(slice_tensor_1, [1, 4])
slice_tensor = aten.slice.Tensor(row_float32, 0, 0, 4)
view_default = aten.view.default(slice_tensor, [1, 4])
mul = aten.mul.Tensor(hidden_states, view_default)
add = aten.add.Tensor(mul, view_default_1)
clone_default = aten.clone.default(add)
return [add, clone_default]"""
    )
    assert_same(program, result.program)


def test_the_new_inputs_are_described() -> None:
    step = Hoist()(specialised(Attention())).program
    assert step.inputs == (
        Value("hidden_states", Kind.LATENTS, (1, 3, 4), torch.float32),
        Value("row_float32", Kind.TABLE_ROW, (192,), torch.float32),
        Value("fixed_float32", Kind.FIXED, (256,), torch.float32),
    )


@pytest.mark.parametrize(
    ("granularity", "sites"),
    [(Granularity.OUTPUT, 1), (Granularity.STACK, 1), (Granularity.BLOCK, 2), (Granularity.MODULE, 2)],
)
def test_attention_models_compute_the_same_bit_for_bit(granularity: Granularity, sites: int) -> None:
    program = specialised(Attention(), (0,) * sites, granularity)
    assert_same(program, Hoist()(program).program)


def test_independent_weights_leave_the_step() -> None:
    step = Hoist()(specialised(Attention(1))).program
    layers = {name.rpartition(".")[0] for name in step.weights}
    assert layers == {"blocks.0.query", "blocks.0.out", "out"}


def test_cached_step_keeps_its_coefficients_and_hoists_the_head() -> None:
    program = specialised(Attention(), (2,), Granularity.STACK)
    step = Hoist()(program).program
    assert [value.name for value in step.inputs] == ["coefficients", "history_0_0", "history_0_1", "row_float32"]
    assert list(step.weights) == ["out.weight", "out.bias"]
    history = {f"history_0_{slot}": torch.randn(1, 3, 4) for slot in range(2)}
    assert_same(program, step, {**INPUTS, **history, "coefficients": torch.tensor([1.5, -0.5])})


def test_a_graph_of_latents_and_weights_only_is_left_alone() -> None:
    program = specialised(Formula(lambda self, hidden, timestep, context: self.linear(hidden) * self.table[0]))
    result = Hoist()(program)
    assert result.modified is False
    assert show(result.program) == show(program)


def test_the_given_program_stays_as_it_was() -> None:
    program = specialised(Attention())
    before = show(program)
    Hoist()(program)
    assert show(program) == before


def test_specialise_must_have_run() -> None:
    with pytest.raises(PassError, match="pass hoist on capture: needs specialise to run first"):
        Hoist()(annotated(Plain()))


@pytest.mark.parametrize(
    ("forward", "crossing"),
    [
        (lambda self, hidden, timestep, context: hidden * (1 - timestep / 1000), ["timestep"]),
        (lambda self, hidden, timestep, context: hidden + context.sin()[:, :1].expand(1, 3, 4), ["sin"]),
        (lambda self, hidden, timestep, context: hidden * self.embed(timestep).chunk(2, -1)[0].sum(), ["sum_1"]),
        (lambda self, hidden, timestep, context: hidden[..., :2] * self.embed(timestep).chunk(2, -1)[1], ["linear"]),
        (lambda self, hidden, timestep, context: hidden + context.topk(1).values[:, :1], ["getitem"]),
        (lambda self, hidden, timestep, context: hidden + self.table.cos()[0] * self.table[1], ["mul"]),
        (lambda self, hidden, timestep, context: hidden + self.table[1] * 2, []),
        (
            lambda self, hidden, timestep, context: (hidden.sin(), timestep.cos(), context),
            ["encoder_hidden_states", "cos"],
        ),
    ],
    ids=[
        "arithmetic on an input",
        "view of a value",
        "reduction of a view",
        "piece of a value",
        "piece of no view",
        "product of weights",
        "view of a weight",
        "results",
    ],
)
def test_what_crosses_is_the_last_value_that_is_not_cheap(forward: Forward, crossing: list[str]) -> None:
    program, result = hoisted(forward)
    graph = program.module.graph
    assert [node.name for node in boundary(graph, binding_times(graph))] == crossing
    assert result.modified is bool(crossing)
    assert_same(program, result.program)


def test_a_value_of_weights_only_is_fixed() -> None:
    _, result = hoisted(lambda self, hidden, timestep, context: hidden + self.table.cos().sum())
    assert packed_inputs(result.program) == {"fixed_float32": (64,)}


def test_a_value_of_timestep_and_conditioning_goes_to_the_row() -> None:
    _, result = hoisted(lambda self, hidden, timestep, context: hidden + (context * timestep).sum())
    assert packed_inputs(result.program) == {"row_float32": (64,)}


def test_each_dtype_has_an_input_of_its_own() -> None:
    def forward(self: Formula, hidden: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        shift = timestep.sin() + timestep.to(torch.bfloat16).cos() + timestep.double().tan()
        index = (context[:, :1] > 0).long().cumsum(-1) % 3
        masked = torch.where(context[:, 1:] > 0, hidden, -hidden)
        turn = torch.polar(context[0, :, :2].exp(), context[0, :, 2:]).sum(0)
        turned = torch.view_as_complex(hidden.unflatten(-1, (2, 2))) * turn
        return masked + hidden.gather(1, index) * shift.sum() + torch.view_as_real(turned).flatten(2)

    def crossing(self: Formula, hidden: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        narrow, wide = timestep.to(torch.bfloat16).cos(), timestep.double().tan()
        return forward(self, hidden, timestep, context) + hidden * narrow + hidden * wide

    program, result = hoisted(crossing)
    assert packed_inputs(result.program) == {
        "row_float64": (128,),
        "row_bfloat16": (64,),
        "fixed_bool": (64,),
        "fixed_int64": (64,),
        "fixed_complex64": (64,),
    }
    assert_same(program, result.program)


def test_attention_on_the_conditioning_is_hoisted() -> None:
    def forward(self: Formula, hidden: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        return hidden + functional.scaled_dot_product_attention(context, context, context).sum(1)

    program, result = hoisted(forward)
    assert "scaled_dot_product_attention" not in show(result.program)
    assert_same(program, result.program)


def test_a_draw_stays_in_the_step() -> None:
    def forward(self: Formula, hidden: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        return hidden + functional.dropout(context.sin(), 0.5, training=True).sum(1)

    _, result = hoisted(forward)
    nodes = list(result.program.module.graph.nodes)
    assert any(is_random(node) for node in nodes)
    assert aten.sin.default not in [node.target for node in nodes]


def test_a_scalar_crosses() -> None:
    def forward(self: Formula, hidden: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        return hidden * timestep.sin().sum()

    program, result = hoisted(forward)
    (node,) = [node for node in result.program.module.graph.nodes if layout_of(node)]
    (hoisted_node,) = [node for node in program.module.graph.nodes if node.name == "sum_1"]
    assert layout_of(node) == (Entry(origin_of(hoisted_node), 0, ()),)
    assert_same(program, result.program)


def test_a_value_with_permuted_strides_can_be_viewed_as_before() -> None:
    def forward(self: Formula, hidden: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        return hidden + context.transpose(1, 2).sin().transpose(1, 2).view(1, 8)[:, :4]

    program, result = hoisted(forward)
    assert_same(program, result.program)


def test_a_value_that_latents_are_written_to_stays_in_the_step() -> None:
    def forward(self: Formula, hidden: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        canvas = torch.zeros(1, 3, 4)
        canvas[:, :2] = hidden[:, :2]
        return hidden + canvas.sin()

    program, result = hoisted(forward)
    other = {**INPUTS, "hidden_states": INPUTS["hidden_states"] + 1}
    record = Record(program)
    record.run(*(INPUTS[value.name] for value in program.inputs))
    packed = pack(result.program, record.values)
    expected, actual = (call(each, {**other, **packed})["prediction_0"] for each in (program, result.program))
    assert torch.equal(actual, expected)


def modulated(self: Formula, hidden: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
    """A row of 16 bytes, one of 120 that is made of one of 480, and a value of the conditioning."""
    small, large = self.embed(timestep), self.time(timestep.cos().expand(30, 1)).sum(1)
    return hidden * small + (hidden.mean() * large).sum() + context.exp().sum()


@pytest.mark.parametrize(
    ("row_bytes", "rows", "staying"),
    [
        (None, ["linear", "sum_1"], []),
        (136, ["linear", "sum_1"], []),
        (135, ["linear", "cos"], ["sum_1", "linear_1"]),
    ],
)
def test_the_largest_rows_stay_in_the_step_where_a_row_is_too_large(
    row_bytes: int | None, rows: list[str], staying: list[str]
) -> None:
    program = specialised(Formula(modulated))
    step = Hoist(row_bytes)(program).program
    (row,) = [node for node in step.module.graph.nodes if node.name == "row_float32"]
    nodes = by_origin(program.module.graph)
    assert [nodes[entry.node].name for entry in layout_of(row)] == rows
    assert {node.name for node in step.module.graph.nodes if is_kept_in_step(node)} == set(staying)
    assert_same(program, step)


def test_what_depends_on_the_conditioning_alone_is_hoisted_whatever_the_limit() -> None:
    step = Hoist(0)(specialised(Formula(modulated))).program
    assert packed_inputs(step) == {"row_float32": (64,), "fixed_float32": (64,)}
    assert packed_inputs(Hoist(0)(specialised(Attention())).program)["fixed_float32"] == (256,)


@pytest.mark.parametrize("row_bytes", [0, 4, 32, 64, None])
@pytest.mark.parametrize("module", [Attention(), Formula(modulated)], ids=["attention", "formula"])
def test_the_limit_changes_no_value(module: torch.nn.Module, row_bytes: int | None) -> None:
    program = specialised(module)
    assert_same(program, Hoist(row_bytes)(program).program)


def test_a_value_that_was_not_captured_is_refused() -> None:
    """Its number links it to the captured program, in which the prologue computes it."""
    nodes = [fx.Graph().placeholder("nowhere")]
    set_result(nodes[0], torch.empty(2, device="meta"))
    with pytest.raises(PassError, match="node nowhere is of no captured program"):
        layout(nodes)
