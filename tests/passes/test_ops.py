import operator

import pytest
import torch
from torch import Tensor, fx
from torch.nn import functional

from recache_compile.passes.ops import CACHE_POINT, is_cheap, is_random, packet, remove_dead_code
from tests.passes.tiny import Formula, aten, captured, show_graph


def one_call(target: object, *args: object, operands: int = 1, **kwargs: object) -> fx.Node:
    """A graph of placeholders and one call, which takes them and then `args`."""
    graph = fx.Graph()
    inputs = [graph.placeholder(f"input_{number}") for number in range(operands)]
    return graph.call_function(target, (*inputs, *args), kwargs)


def calls_named(module: Formula, target: object) -> list[fx.Node]:
    graph = captured(module)[0].module.graph
    return [node for node in graph.nodes if packet(node) is target]


def test_packet_of_an_aten_call_is_the_same_for_all_overloads() -> None:
    assert packet(one_call(aten.add.Tensor, 1)) is aten.add
    assert packet(one_call(aten.add.Scalar, 1)) is aten.add


def test_packet_of_anything_else_is_its_target() -> None:
    assert packet(one_call(operator.getitem, 0)) is operator.getitem


def test_captured_attention_without_dropout_is_tagged_seeded_but_not_random() -> None:
    def forward(self: Formula, hidden: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        return functional.scaled_dot_product_attention(hidden, context, context)

    (attention,) = calls_named(Formula(forward), aten.scaled_dot_product_attention)
    assert torch.Tag.nondeterministic_seeded in attention.target.tags
    assert not is_random(attention)


@pytest.mark.parametrize(
    ("args", "kwargs", "random"),
    [
        ((), {}, False),
        ((None, 0.0, True), {}, False),
        ((None, 0.1), {}, True),
        ((), {"dropout_p": 0.1}, True),
        ((), {"dropout_p": 0.0, "is_causal": True}, False),
    ],
)
def test_attention_is_random_only_with_a_probability(
    args: tuple[object, ...], kwargs: dict[str, object], random: bool
) -> None:
    assert is_random(one_call(aten.scaled_dot_product_attention.default, *args, operands=3, **kwargs)) is random


def test_captured_dropout_in_training_is_random() -> None:
    def forward(self: Formula, hidden: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        return functional.dropout(hidden, 0.5, training=True)

    graph = captured(Formula(forward))[0].module.graph
    assert len([node for node in graph.nodes if is_random(node)]) == 1


@pytest.mark.parametrize("target", [aten.randn_like.default, aten.bernoulli.default])
def test_draws_are_random(target: object) -> None:
    assert is_random(one_call(target))


@pytest.mark.parametrize(
    ("probability", "training", "random"), [(0.5, True, True), (0.5, False, False), (0.0, True, False)]
)
def test_dropout_is_random_only_when_it_is_on(probability: float, training: bool, random: bool) -> None:
    assert is_random(one_call(aten.dropout.default, probability, training)) is random


def test_captured_dropout_at_inference_is_not_random() -> None:
    (dropout,) = calls_named(
        Formula(lambda self, hidden, timestep, context: functional.dropout(hidden, 0.5, self.training)), aten.dropout
    )
    assert torch.Tag.nondeterministic_seeded in dropout.target.tags
    assert not is_random(dropout)


def test_placeholders_and_arithmetic_are_not_random() -> None:
    node = one_call(aten.add.Tensor, operands=2)
    assert not is_random(node)
    assert not is_random(node.args[0])


@pytest.mark.parametrize(
    "node",
    [
        one_call(aten.unsqueeze.default, 1),
        one_call(aten.slice.Tensor, 0, 0, 4),
        one_call(aten.add.Tensor, 1),
        one_call(aten.rsub.Scalar, 1),
        one_call(aten.to.dtype, torch.float16),
    ],
    ids=lambda node: node.name,
)
def test_views_and_arithmetic_on_one_tensor_are_cheap(node: fx.Node) -> None:
    assert is_cheap(node)


@pytest.mark.parametrize(
    "node",
    [
        one_call(aten.add.Tensor, operands=2),
        one_call(aten.silu.default),
        one_call(aten.linear.default, operands=2),
        one_call(aten.cat.default, operands=2),
    ],
    ids=lambda node: node.name,
)
def test_other_calls_are_not_cheap(node: fx.Node) -> None:
    assert not is_cheap(node)


@pytest.mark.parametrize("target", [aten.full.default, aten.zeros.default, aten.ones.default])
def test_a_fill_is_cheap(target: object) -> None:
    size = ([2, 3], 1.0) if target is aten.full.default else ([2, 3],)
    assert is_cheap(one_call(target, *size, operands=0))


def test_inputs_are_not_cheap() -> None:
    assert not is_cheap(fx.Graph().placeholder("input"))


@pytest.mark.parametrize(("target", "cheap"), [(aten.chunk.default, True), (aten.topk.default, False)])
def test_an_element_is_as_cheap_as_its_tuple(target: object, cheap: bool) -> None:
    pieces = one_call(target, 2)
    assert is_cheap(pieces.graph.call_function(operator.getitem, (pieces, 0))) is cheap


def test_dead_attention_and_dead_draws_are_removed_writes_and_inputs_stay() -> None:
    graph = fx.Graph()
    used, unused = graph.placeholder("used"), graph.placeholder("unused")
    graph.call_function(aten.scaled_dot_product_attention.default, (used, used, used))
    graph.call_function(aten.dropout.default, (used, 0.5, True))
    graph.call_function(aten.add_.Tensor, (unused, 1))
    graph.output([used])
    remove_dead_code(graph)
    assert show_graph(graph) == "used: input\nunused: input\nadd__tensor = aten.add_.Tensor(unused, 1)\nreturn [used]"


def test_a_cache_point_is_an_identity_that_does_not_alias() -> None:
    value = torch.randn(2, 3, dtype=torch.bfloat16)
    marked = CACHE_POINT(value, 7)
    assert torch.equal(marked, value)
    assert marked.data_ptr() != value.data_ptr()


@pytest.mark.parametrize("base", [(), (None,), (torch.randn(2, 3),)], ids=["left out", "none", "given"])
def test_a_cache_point_obeys_the_rules_of_operators(base: tuple[object, ...]) -> None:
    torch.library.opcheck(CACHE_POINT, (torch.randn(2, 3), 0, *base), test_utils=("test_schema", "test_faketensor"))


def test_a_cache_point_does_not_change_its_value_by_the_base() -> None:
    value = torch.randn(2, 3)
    assert torch.equal(CACHE_POINT(value, 0, torch.randn(2, 3)), value)
