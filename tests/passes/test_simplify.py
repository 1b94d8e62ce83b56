from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx
from torch.nn import functional

from recache_compile.ir.program import Program
from recache_compile.passes.base import PassResult
from recache_compile.passes.ops import is_random
from recache_compile.passes.simplify import Simplify, merge_equal_calls, remove_identities
from tests.passes.tiny import Attention, Formula, Forward, Plain, aten, call, captured, example, show, show_graph


def simplified(forward: Forward) -> tuple[Program, PassResult]:
    program = captured(Formula(forward))[0]
    return program, Simplify()(program)


def targets(program: Program) -> list[str]:
    return [str(node.target) for node in program.module.graph.nodes if node.op == "call_function"]


def test_an_exported_graph_becomes_what_inference_needs() -> None:
    def forward(self: Formula, hidden: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        hidden = functional.dropout(hidden.detach(), 0.5, self.training).to(torch.float32).contiguous()
        context.mean()
        return hidden * timestep.sin() + timestep.sin()

    program, result = simplified(forward)
    assert result.modified
    assert (
        show(result.program)
        == """\
hidden_states: latents 1x3x4
timestep: timestep 1
encoder_hidden_states: conditioning 1x2x4
sin = aten.sin.default(timestep)
mul = aten.mul.Tensor(hidden_states, sin)
add = aten.add.Tensor(mul, sin)
return [add]"""
    )
    inputs = example(Attention())
    assert torch.equal(call(result.program, inputs)["prediction_0"], call(program, inputs)["prediction_0"])


def test_the_given_program_stays_as_it_was() -> None:
    program = captured(Formula(lambda self, hidden, timestep, context: hidden.detach() + 1))[0]
    before = show(program)
    Simplify()(program)
    assert show(program) == before


def test_a_simple_graph_is_left_alone() -> None:
    program = captured(Plain())[0]
    result = Simplify()(program)
    assert result.modified is False
    assert show(result.program) == show(program)
    assert Simplify()(result.program).modified is False


def test_attention_models_compute_the_same() -> None:
    module = Attention()
    result = Simplify()(captured(module)[0])
    inputs = example(module)
    assert torch.equal(call(result.program, inputs)["prediction_0"], module(**inputs))


@pytest.mark.parametrize(
    "forward",
    [
        lambda self, hidden, timestep, context: hidden.to(torch.bfloat16),
        lambda self, hidden, timestep, context: hidden.transpose(1, 2).contiguous(),
        lambda self, hidden, timestep, context: hidden.type_as(timestep.long()),
    ],
    ids=["other dtype", "other strides", "other dtype by example"],
)
def test_casts_that_change_something_stay(forward: Forward) -> None:
    program, result = simplified(forward)
    assert targets(result.program)[-1] == targets(program)[-1]
    inputs = example(Attention())
    expected, actual = (call(each, inputs)["prediction_0"] for each in (program, result.program))
    assert (actual.dtype, actual.stride()) == (expected.dtype, expected.stride())


def test_reshapes_that_change_nothing_are_removed() -> None:
    def forward(self: Formula, hidden: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        same = hidden.transpose(1, 2).transpose(1, 2)[:, 0:].reshape(1, 3, 4).view(1, 3, 4).expand(1, -1, 4)
        return same.sin()

    program, result = simplified(forward)
    assert targets(result.program) == ["aten.transpose.int", "aten.transpose.int", "aten.sin.default"]
    inputs = example(Attention())
    assert torch.equal(call(result.program, inputs)["prediction_0"], call(program, inputs)["prediction_0"])


@pytest.mark.parametrize(
    "forward",
    [
        lambda self, hidden, timestep, context: hidden[:, :2],
        lambda self, hidden, timestep, context: hidden.reshape(1, 4, 3),
        lambda self, hidden, timestep, context: hidden[:, :1].expand(1, 3, 4),
        lambda self, hidden, timestep, context: hidden.view(torch.int32),
    ],
    ids=["part", "other shape", "repeated", "other dtype"],
)
def test_reshapes_that_change_something_stay(forward: Forward) -> None:
    program, result = simplified(forward)
    assert targets(result.program)[-1] == targets(program)[-1]


def test_checks_are_removed() -> None:
    graph = fx.Graph()
    value = graph.placeholder("value")
    graph.call_function(aten._assert_tensor_metadata.default, (value, None, None, torch.float32))
    graph.output([value])
    remove_identities(graph)
    assert show_graph(graph) == "value: input\nreturn [value]"


@pytest.mark.parametrize("target", [aten.lift_fresh_copy.default, aten.detach.default, aten.alias.default])
def test_identities_are_removed(target: object) -> None:
    graph = fx.Graph()
    value = graph.placeholder("value")
    graph.output([graph.call_function(aten.neg.default, (graph.call_function(target, (value,)),))])
    remove_identities(graph)
    assert show_graph(graph) == "value: input\nneg_default = aten.neg.default(value)\nreturn [neg_default]"


def test_dropout_in_training_stays_and_its_draws_are_not_merged() -> None:
    def forward(self: Formula, hidden: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        return functional.dropout(hidden, 0.5, True) + functional.dropout(hidden, 0.5, True)

    _, result = simplified(forward)
    assert len([node for node in result.program.module.graph.nodes if is_random(node)]) == 2


def test_dropout_of_probability_zero_goes() -> None:
    _, result = simplified(lambda self, hidden, timestep, context: functional.dropout(hidden, 0.0, True) + 1)
    assert targets(result.program) == ["aten.add.Tensor"]


def test_equal_attention_is_computed_once_and_unused_attention_not_at_all() -> None:
    def forward(self: Formula, hidden: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        functional.scaled_dot_product_attention(hidden, hidden, hidden)
        twice = [functional.scaled_dot_product_attention(hidden, context, context) for _ in range(2)]
        return twice[0] * twice[1]

    _, result = simplified(forward)
    assert targets(result.program) == ["aten.scaled_dot_product_attention.default", "aten.mul.Tensor"]


def test_equal_chains_and_weights_are_merged() -> None:
    def forward(self: Formula, hidden: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        return self.linear(hidden).sin().cos() - self.linear(hidden).sin().tan()

    _, result = simplified(forward)
    names = ["linear", "sin", "cos", "tan", "sub"]
    assert [target.split(".")[1] for target in targets(result.program)] == names
    assert list(result.program.weights) == ["linear.weight", "linear.bias"]


@pytest.mark.parametrize(("left", "right"), [(1, 1.0), (1, True), (0.5, 0.25), ([1, 2], [2, 1])])
def test_calls_with_other_constants_are_not_merged(left: object, right: object) -> None:
    graph = fx.Graph()
    value = graph.placeholder("value")
    graph.output([graph.call_function(aten.mul.Tensor, (value, constant)) for constant in (left, right)])
    merge_equal_calls(graph)
    assert len(graph.find_nodes(op="call_function", target=aten.mul.Tensor)) == 2


def test_calls_with_other_keywords_are_not_merged() -> None:
    graph = fx.Graph()
    value = graph.placeholder("value")
    options = ({"alpha": 1}, {"alpha": 2}, {"alpha": 1})
    graph.output([graph.call_function(aten.add.Tensor, (value, value), option) for option in options])
    merge_equal_calls(graph)
    kept = graph.find_nodes(op="call_function", target=aten.add.Tensor)
    assert [node.kwargs["alpha"] for node in kept] == [1, 2]


def test_tensors_that_are_written_to_are_not_merged() -> None:
    def forward(self: Formula, hidden: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        canvas, zeros = torch.zeros(1, 3, 4), torch.zeros(1, 3, 4)
        canvas[:, :2] = hidden[:, :2]
        return canvas + zeros

    program, result = simplified(forward)
    inputs = example(Attention())
    assert torch.equal(call(result.program, inputs)["prediction_0"], call(program, inputs)["prediction_0"])


def test_equal_calls_around_a_write_are_not_merged() -> None:
    def forward(self: Formula, hidden: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        hidden = hidden.clone()
        before = hidden.sin()
        hidden[:, :2].add_(1)
        return before - hidden.sin()

    program, result = simplified(forward)
    inputs = example(Attention())
    assert torch.equal(call(result.program, inputs)["prediction_0"], call(program, inputs)["prediction_0"])


def halves(value: Tensor) -> Tensor:
    return torch.cat(value.chunk(2, -1), -1)


def slices(value: Tensor) -> Tensor:
    return torch.cat([value[:, :1], value[:, 1:]], 1)


def single(value: Tensor) -> Tensor:
    return torch.cat([value], 1)


@pytest.mark.parametrize("cut", [halves, slices, single])
def test_parts_that_are_joined_again_are_the_whole(cut: Callable[[Tensor], Tensor]) -> None:
    program, result = simplified(lambda self, hidden, timestep, context: cut(hidden.sin()).cos())
    assert targets(result.program) == ["aten.sin.default", "aten.cos.default"]
    inputs = example(Attention())
    assert torch.equal(call(result.program, inputs)["prediction_0"], call(program, inputs)["prediction_0"])


@pytest.mark.parametrize(
    "cut",
    [
        lambda value: torch.cat([value[:, 1:], value[:, :1]], 1),
        lambda value: torch.cat([value[:, :1], value[:, 2:]], 1),
        lambda value: torch.cat([value[:, :1], value[:, :1], value[:, 1:]], 1),
        lambda value: torch.cat([value[:, :1], value[:, 1:], value], 1),
        lambda value: torch.cat([value[:, :1], value.sin()[:, 1:]], 1),
        lambda value: torch.cat([value[..., :3], value[..., 1:]], 1),
        lambda value: torch.cat([torch.zeros(0), value], 1),
    ],
    ids=["swapped", "a gap", "twice", "more", "of two", "another dimension", "an empty one of another rank"],
)
def test_other_parts_are_joined(cut: Callable[[Tensor], Tensor]) -> None:
    _, result = simplified(lambda self, hidden, timestep, context: cut(hidden.cos()).sin())
    assert "aten.cat.default" in targets(result.program)


def test_a_result_that_is_joined_is_no_other_value() -> None:
    """Whoever calls may write to it."""
    _, result = simplified(lambda self, hidden, timestep, context: slices(hidden))
    assert "aten.cat.default" in targets(result.program)
