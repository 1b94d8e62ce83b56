import torch
from torch import Tensor
from torch.nn import functional

from recache_compile.passes.split_bias import SplitBias
from tests.passes.tiny import Attention, Formula, Plain, call, captured, example, show, simple


def biased(self: Formula, hidden: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
    return self.linear(hidden).sin()


def test_the_bias_is_added_after_the_product() -> None:
    program = simple(Formula(biased))
    result = SplitBias()(program)
    assert result.modified
    assert (
        show(result.program)
        == """\
hidden_states: latents 1x3x4
timestep: timestep 1
encoder_hidden_states: conditioning 1x2x4
linear_weight: weight linear.weight
linear_bias: weight linear.bias
linear_default = aten.linear.default(hidden_states, linear_weight)
add_tensor = aten.add.Tensor(linear_default, linear_bias)
sin = aten.sin.default(add_tensor)
return [sin]"""
    )


def test_attention_models_compute_the_same() -> None:
    module = Attention()
    program = captured(module)[0]
    inputs = example(module)
    expected, actual = (call(each, inputs)["prediction_0"] for each in (program, SplitBias()(program).program))
    torch.testing.assert_close(actual, expected)


def test_products_without_a_bias_are_left_alone() -> None:
    def forward(self: Formula, hidden: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        return functional.linear(hidden, self.table) @ self.table

    for module in (Plain(), Formula(forward)):
        program = captured(module)[0]
        result = SplitBias()(program)
        assert result.modified is False
        assert show(result.program) == show(program)


def test_half_types_are_left_alone() -> None:
    module = Formula(biased).to(torch.bfloat16)
    program = captured(module, example(module, dtype=torch.bfloat16))[0]
    assert SplitBias()(program).modified is False
