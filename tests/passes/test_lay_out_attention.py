from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from recache_compile.passes.lay_out_attention import LayOutAttention
from tests.passes.tiny import Attention, Formula, call, captured, example, show, simple


def heads(self: Formula, hidden: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
    query, key = (each.unflatten(-1, (2, 2)).transpose(1, 2) for each in (hidden, context))
    return functional.scaled_dot_product_attention(query, key, key, scale=0.5) * timestep


def test_transposed_arguments_become_dense() -> None:
    program = simple(Formula(heads))
    result = LayOutAttention(min_queries=3)(program)
    assert result.modified
    assert (
        show(result.program)
        == """\
hidden_states: latents 1x3x4
timestep: timestep 1
encoder_hidden_states: conditioning 1x2x4
unflatten = aten.unflatten.int(hidden_states, -1, [2, 2])
transpose = aten.transpose.int(unflatten, 1, 2)
unflatten_1 = aten.unflatten.int(encoder_hidden_states, -1, [2, 2])
transpose_1 = aten.transpose.int(unflatten_1, 1, 2)
contiguous_default = aten.contiguous.default(transpose)
contiguous_default_1 = aten.contiguous.default(transpose_1)
contiguous_default_2 = aten.contiguous.default(transpose_1)
scaled_dot_product_attention = aten.scaled_dot_product_attention.default(contiguous_default, contiguous_default_1, contiguous_default_2, scale=0.5)
mul = aten.mul.Tensor(scaled_dot_product_attention, timestep)
return [mul]"""
    )
    inputs = example(Attention())
    torch.testing.assert_close(call(result.program, inputs), call(program, inputs))


def test_masks_are_passed_on() -> None:
    def forward(self: Formula, hidden: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        value = hidden.unflatten(-1, (2, 2)).transpose(1, 2)
        return functional.scaled_dot_product_attention(value, value, value, timestep.expand(1, 1, 3, 3))

    program = captured(Formula(forward))[0]
    result = LayOutAttention(min_queries=3)(program)
    assert result.modified
    inputs = example(Attention())
    torch.testing.assert_close(call(result.program, inputs), call(program, inputs))


def dense(self: Formula, hidden: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
    value = hidden.reshape(1, 2, 3, 2)
    return functional.scaled_dot_product_attention(value, value, value)


def repeated(self: Formula, hidden: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
    query, key = hidden.reshape(1, 2, 3, 2), hidden[:, None, :, :2].expand(1, 2, 3, 2)
    return functional.scaled_dot_product_attention(query, key, key)


def flat(self: Formula, hidden: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
    value = hidden.transpose(1, 2)
    return functional.scaled_dot_product_attention(value, value, value)


@pytest.mark.parametrize("forward", [dense, repeated, flat])
def test_other_arguments_are_left_alone(forward: Callable[..., Tensor]) -> None:
    program = captured(Formula(forward))[0]
    result = LayOutAttention(min_queries=1)(program)
    assert result.modified is False
    assert show(result.program) == show(program)


def test_short_attention_is_left_alone() -> None:
    assert LayOutAttention()(captured(Formula(heads))[0]).modified is False


def test_done_twice_is_done_once() -> None:
    result = LayOutAttention(min_queries=3)(captured(Formula(heads))[0])
    assert LayOutAttention(min_queries=3)(result.program).modified is False
