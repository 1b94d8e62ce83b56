import pytest
import torch
from torch import Tensor, fx
from torch.nn import functional

from recache_compile.ir.meta import describe_input
from recache_compile.ir.program import Binding
from recache_compile.ir.value import Kind, Value
from recache_compile.passes.binding_times import binding_times
from recache_compile.passes.ops import is_random
from tests.passes.tiny import Attention, Formula, aten, captured

NOTHING, TIMESTEP, CONDITIONING, LATENTS = Binding.NOTHING, Binding.TIMESTEP, Binding.CONDITIONING, Binding.LATENTS


def times_of(function: object) -> dict[str, Binding]:
    """Binding times by node name, apart from the weights."""
    graph = captured(Formula(function))[0].module.graph
    return {node.name: time for node, time in binding_times(graph).items() if node.op == "call_function"}


def test_a_value_depends_on_all_that_it_is_computed_from() -> None:
    def forward(self: Formula, hidden: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        modulated = self.table.abs()[:2] * timestep.sin() * context.cos()
        return hidden.tanh() + modulated.sum()

    assert times_of(forward) == {
        "abs_1": NOTHING,
        "slice_1": NOTHING,
        "sin": TIMESTEP,
        "mul": TIMESTEP,
        "cos": CONDITIONING,
        "mul_1": TIMESTEP | CONDITIONING,
        "tanh": LATENTS,
        "sum_1": TIMESTEP | CONDITIONING,
        "add": TIMESTEP | CONDITIONING | LATENTS,
    }


def test_every_node_has_a_time_and_weights_depend_on_nothing() -> None:
    graph = captured(Attention())[0].module.graph
    times = binding_times(graph)
    assert list(times) == list(graph.nodes)
    assert {times[node] for node in graph.find_nodes(op="get_attr")} == {NOTHING}


def test_the_prediction_depends_on_everything() -> None:
    graph = captured(Attention())[0].module.graph
    assert binding_times(graph)[graph.output_node()] == TIMESTEP | CONDITIONING | LATENTS


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (Kind.LATENTS, LATENTS),
        (Kind.HISTORY, LATENTS),
        (Kind.TIMESTEP, TIMESTEP),
        (Kind.TABLE_ROW, TIMESTEP),
        (Kind.COEFFICIENTS, TIMESTEP),
        (Kind.CONDITIONING, CONDITIONING),
        (Kind.FIXED, CONDITIONING),
    ],
)
def test_each_kind_of_input_has_a_time(kind: Kind, expected: Binding) -> None:
    graph = fx.Graph()
    node = graph.placeholder("input")
    describe_input(node, Value("input", kind, (2,), torch.float32))
    graph.output([node])
    assert binding_times(graph)[node] == expected


def test_a_draw_counts_as_latents_and_so_does_all_that_reads_it() -> None:
    def forward(self: Formula, hidden: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        return hidden + functional.dropout(context, 0.5, training=True).sum()

    graph = captured(Formula(forward))[0].module.graph
    times = binding_times(graph)
    draws = [time for node, time in times.items() if is_random(node)]
    assert draws == [CONDITIONING | LATENTS]
    assert [times[node] for node in graph.nodes if node.name == "sum_1"] == [CONDITIONING | LATENTS]


def test_a_draw_from_nothing_counts_as_latents() -> None:
    graph = fx.Graph()
    draw = graph.call_function(aten.randn.default, ([2, 3],))
    graph.output([draw])
    assert binding_times(graph)[draw] == LATENTS


def test_attention_on_the_conditioning_is_not_a_draw() -> None:
    def forward(self: Formula, hidden: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        return hidden + functional.scaled_dot_product_attention(context, context, context).sum()

    assert times_of(forward)["scaled_dot_product_attention"] == CONDITIONING


def test_a_tensor_that_latents_are_written_to_depends_on_them() -> None:
    def forward(self: Formula, hidden: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        canvas = torch.zeros(1, 3, 4)
        canvas[:, :2] = hidden[:, :2]
        return hidden + canvas.sin()

    assert LATENTS in times_of(forward)["sin"]
