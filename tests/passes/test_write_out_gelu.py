import pytest
import torch
from torch import Tensor
from torch.nn import functional

from recache_compile.passes.write_out_gelu import WriteOutGelu
from tests.passes.tiny import Attention, Formula, Plain, call, captured, example, show, simple


def gelu(self: Formula, hidden: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
    return functional.gelu(hidden, approximate="tanh") * timestep


def test_the_tanh_form_becomes_a_sigmoid() -> None:
    result = WriteOutGelu()(simple(Formula(gelu)))
    assert result.modified
    assert (
        show(result.program)
        == """\
hidden_states: latents 1x3x4
timestep: timestep 1
encoder_hidden_states: conditioning 1x2x4
mul_tensor = aten.mul.Tensor(hidden_states, hidden_states)
mul_tensor_1 = aten.mul.Tensor(mul_tensor, 0.07135481627260025)
add_tensor = aten.add.Tensor(mul_tensor_1, 1.5957691216057308)
mul_tensor_2 = aten.mul.Tensor(hidden_states, add_tensor)
sigmoid_default = aten.sigmoid.default(mul_tensor_2)
mul_tensor_3 = aten.mul.Tensor(hidden_states, sigmoid_default)
mul = aten.mul.Tensor(mul_tensor_3, timestep)
return [mul]"""
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values_are_the_same_within_rounding(dtype: torch.dtype) -> None:
    def forward(self: Formula, hidden: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        return functional.gelu(hidden, approximate="tanh")

    edges = torch.tensor([0.0, 1e-30, 1e4, -1e4, float("inf"), torch.finfo(dtype).max, torch.finfo(dtype).min])
    values = torch.cat([torch.linspace(-12, 12, 10_001), edges]).to(dtype).reshape(1, 1, -1)
    inputs = {**example(Attention(), dtype=dtype), "hidden_states": values}
    program = captured(Formula(forward), inputs)[0]
    result = WriteOutGelu()(program).program
    before, after = (call(each, inputs)["prediction_0"] for each in (program, result))
    ordinary = values.abs() < 100
    true = functional.gelu(values.double(), approximate="tanh")
    assert after.dtype == dtype
    rounding = 4 * torch.finfo(dtype).eps * true.abs().clamp(min=0.25)
    assert ((after.double() - true).abs() <= rounding)[ordinary].all()
    assert torch.equal(after[~ordinary], before[~ordinary])


@pytest.mark.parametrize(
    "forward",
    [
        lambda self, hidden, timestep, context: functional.gelu(hidden),
        lambda self, hidden, timestep, context: hidden.tanh() * functional.silu(hidden),
    ],
    ids=["exact", "others"],
)
def test_other_activations_are_left_alone(forward: object) -> None:
    program = captured(Formula(forward))[0]  # type: ignore[arg-type]
    result = WriteOutGelu()(program)
    assert result.modified is False
    assert show(result.program) == show(program)


def test_a_graph_without_it_is_left_alone() -> None:
    assert WriteOutGelu()(captured(Plain())[0]).modified is False


def test_done_twice_is_done_once() -> None:
    result = WriteOutGelu()(captured(Formula(gelu))[0])
    assert WriteOutGelu()(result.program).modified is False
