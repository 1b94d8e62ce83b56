from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from recache_compile.errors import PassError
from recache_compile.ir.cost import count_macs
from recache_compile.ir.program import Granularity, Program
from recache_compile.passes.base import run_passes
from recache_compile.passes.drop_unread_rows import DropUnreadRows
from recache_compile.passes.ops import CACHE_POINT, packet
from recache_compile.passes.row_reads import RULES
from recache_compile.passes.simplify import Simplify
from recache_compile.passes.specialise import Specialise
from tests.conftest import flux_inputs, tiny_flux
from tests.passes.tiny import (
    WIDTH,
    Formula,
    Forward,
    Plain,
    annotated,
    aten,
    call,
    captured,
    example,
    show,
    simple,
    split,
)

TEXT, PICTURE = 2, 3
"""Tokens of the examples."""

CPU = torch.device("cpu")


def joint(self: Formula, hidden: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
    """One block on text and picture, of which the picture is returned."""
    tokens = torch.cat([context, hidden], 1)
    attended = functional.scaled_dot_product_attention(self.linear(tokens), tokens, tokens)
    return (tokens + functional.gelu(self.linear(attended)))[:, TEXT:]


def rows_of_products(program: Program) -> list[int]:
    """How many tokens every matrix product and attention makes."""
    products = (aten.linear, aten.matmul, aten.scaled_dot_product_attention)
    return [node.meta["val"].shape[-2] for node in program.module.graph.nodes if packet(node) in products]


def dropped(forward: Forward) -> tuple[Program, Program, bool]:
    """Before, after, modified; both compute the same."""
    program = simple(Formula(forward))
    result = DropUnreadRows()(program)
    inputs = example(Formula(forward))
    expected, made = (call(each, inputs) for each in (program, result.program))
    for name, value in expected.items():
        torch.testing.assert_close(made[name], value, rtol=1e-6, atol=1e-6)
        assert made[name].shape == value.shape
    for node in result.program.module.graph.nodes:  # facts are those of the values
        if packet(node) is aten.linear:
            assert node.meta["val"].shape[:-1] == node.args[0].meta["val"].shape[:-1]
    return program, result.program, result.modified


def test_a_block_makes_only_the_rows_that_are_read() -> None:
    _, after, modified = dropped(joint)
    assert modified
    assert (
        show(after)
        == """\
hidden_states: latents 1x3x4
encoder_hidden_states: conditioning 1x2x4
linear_weight: weight linear.weight
linear_bias: weight linear.bias
cat = aten.cat.default([encoder_hidden_states, hidden_states], 1)
slice_tensor = aten.slice.Tensor(cat, 1, 2, 5)
linear = aten.linear.default(slice_tensor, linear_weight, linear_bias)
scaled_dot_product_attention = aten.scaled_dot_product_attention.default(linear, cat, cat)
linear_1 = aten.linear.default(scaled_dot_product_attention, linear_weight, linear_bias)
gelu = aten.gelu.default(linear_1)
slice_tensor_1 = aten.slice.Tensor(cat, 1, 2, 5)
add = aten.add.Tensor(slice_tensor_1, gelu)
slice_1 = aten.slice.Tensor(add, 1, 0, 3)
return [slice_1]"""
    )


def test_done_twice_is_done_once() -> None:
    _, after, _ = dropped(joint)
    assert DropUnreadRows()(after).modified is False


@pytest.mark.parametrize("block", [Plain(), Formula(lambda self, hidden, timestep, context: self.linear(hidden))])
def test_a_graph_of_which_everything_is_read_is_left_alone(block: nn.Module) -> None:
    program = simple(block)
    result = DropUnreadRows()(program)
    assert result.modified is False
    assert show(result.program) == show(program)


Through = Callable[[Formula, Tensor, Tensor], Tensor]

THROUGH: dict[str, Through] = {
    "arithmetic": lambda self, tokens, context: (tokens * 2 + context[:, :1]).sigmoid() - tokens,
    "one row for all": lambda self, tokens, context: tokens * context.mean(1, keepdim=True),
    "types": lambda self, tokens, context: tokens.double().clone().to(torch.float32),
    "norms": lambda self, tokens, context: functional.rms_norm(self.norm(tokens), [WIDTH]),
    "a norm that is written out": lambda self, tokens, context: tokens * (tokens.pow(2).mean(-1, keepdim=True) + 1).rsqrt(),
    "softmax": lambda self, tokens, context: tokens.softmax(-1),
    "heads": lambda self, tokens, context: tokens.unflatten(-1, (2, 2)).transpose(1, 2).permute(0, 2, 1, 3).flatten(2),
    "reshapes": lambda self, tokens, context: tokens.reshape(1, -1, 2, 2).unsqueeze(0).squeeze(0).reshape(tokens.shape),
    "pairs": lambda self, tokens, context: torch.stack(tokens.reshape(*tokens.shape[:2], 2, 2).unbind(-1), -1).flatten(2),
    "halves": lambda self, tokens, context: torch.cat([half.neg() for half in tokens.chunk(2, -1)], -1),
    "unequal parts": lambda self, tokens, context: torch.cat(tokens.split([1, 3], -1)[::-1], -1),
    "channels": lambda self, tokens, context: torch.cat([tokens[..., 2:], tokens[..., :2]], -1),
    "one of several": lambda self, tokens, context: torch.stack([tokens, tokens + 1]).select(0, 1),
    "copies of a channel": lambda self, tokens, context: tokens[..., :1].expand(-1, -1, WIDTH).contiguous(),
    "a matrix": lambda self, tokens, context: tokens @ self.table[:4],
    "a mask": lambda self, tokens, context: functional.scaled_dot_product_attention(
        tokens, tokens, tokens, attn_mask=tokens @ tokens.mT
    ),
    "a mask for all": lambda self, tokens, context: functional.scaled_dot_product_attention(
        tokens, tokens, tokens, attn_mask=tokens[..., :1].mT
    ),
    "more tokens": lambda self, tokens, context: torch.cat([context, self.linear(tokens)], 1)[:, TEXT:],
}  # fmt: skip


PARTS: dict[str, Callable[[Tensor], Tensor]] = {
    "the end": lambda made: made[:, TEXT:],
    "the middle": lambda made: made[:, 1:3],
    "one part of two": lambda made: made.split([TEXT, PICTURE], 1)[1],
}


@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS)
def test_parts_are_slices(part: Callable[[Tensor], Tensor]) -> None:
    slices_move(lambda self, tokens, context: tokens.sin(), part)


@pytest.mark.parametrize("through", THROUGH.values(), ids=THROUGH)
def test_slices_move_through(through: Through) -> None:
    slices_move(through, PARTS["the middle"])


def slices_move(through: Through, part: Callable[[Tensor], Tensor]) -> None:
    """The last product makes as many rows as are read, whatever lies between it and the slice."""

    def forward(self: Formula, hidden: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        tokens = torch.cat([context, hidden], 1)
        made = self.linear(through(self, self.linear(tokens), context))
        return part(through(self, made, context))

    before, after, modified = dropped(forward)
    assert modified
    read = call(after, example(Formula(forward)))["prediction_0"].shape[1]
    assert rows_of_products(after)[-1] == read
    assert count_macs(after, CPU) < count_macs(before, CPU)


STOPS: dict[str, Through] = {
    "positions": lambda self, tokens, context: tokens.softmax(1),
    "the mean of all tokens": lambda self, tokens, context: tokens - tokens.mean(1, keepdim=True),
    "causal attention": lambda self, tokens, context: functional.scaled_dot_product_attention(
        tokens, tokens, tokens, is_causal=True
    ),
    "another order": lambda self, tokens, context: tokens.flip(1),
    "every second row": lambda self, tokens, context: torch.cat([tokens[:, ::2], tokens[:, 1::2]], 1),
    "tokens as channels": lambda self, tokens, context: tokens.flatten(1).reshape(tokens.shape),
}  # fmt: skip


@pytest.mark.parametrize("stop", STOPS.values(), ids=STOPS)
def test_what_needs_all_rows_gets_all(stop: Through) -> None:
    def forward(self: Formula, hidden: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        return stop(self, self.linear(torch.cat([context, hidden], 1)), context)[:, TEXT:]

    before, after, modified = dropped(forward)
    assert not modified
    assert show(after) == show(before)


SQUEEZES: dict[str, Callable[[Tensor], Tensor]] = {
    "tokens": lambda value: value.squeeze(1)[:, 2:],
    "batch and tokens": lambda value: value.squeeze((0, 1))[2:],
    "everything": lambda value: value.squeeze()[2:],
}


@pytest.mark.parametrize("squeeze", SQUEEZES.values(), ids=SQUEEZES)
def test_a_dimension_of_which_one_row_is_left_is_not_squeezed(squeeze: Callable[[Tensor], Tensor]) -> None:
    assert not dropped(lambda self, hidden, timestep, context: squeeze(self.linear(hidden)))[2]


def test_one_row_is_left_where_another_dimension_is_squeezed() -> None:
    _, after, modified = dropped(lambda self, hidden, timestep, context: self.linear(hidden).squeeze(0)[2:])
    assert modified
    assert rows_of_products(after) == [1]


def test_empty_pieces_of_another_rank_stop() -> None:
    def forward(self: Formula, hidden: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        return torch.cat([torch.zeros(0), self.linear(hidden)], 1)[:, 1:]

    assert not dropped(forward)[2]


def test_a_call_that_makes_other_rows_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RULES, aten.squeeze, RULES[aten.unsqueeze])
    with pytest.raises(PassError, match=r"drop-unread-rows.*node squeeze would make \[\(1, 4\)\] instead of"):
        dropped(lambda self, hidden, timestep, context: self.linear(hidden).squeeze(1)[:, 2:])


def test_two_readers_get_what_both_read() -> None:
    def forward(self: Formula, hidden: Tensor, timestep: Tensor, context: Tensor) -> tuple[Tensor, ...]:
        made = self.linear(torch.cat([context, hidden], 1))
        return made[:, 1:3] * 2, made[:, 2:4].sin(), made[:, 2:3]

    _, after, _ = dropped(forward)
    assert rows_of_products(after) == [3]


def test_slices_along_two_dimensions_stay() -> None:
    def forward(self: Formula, hidden: Tensor, timestep: Tensor, context: Tensor) -> tuple[Tensor, ...]:
        made = self.linear(hidden).sin()
        return made[:, 1:], made[..., 1:]

    assert not dropped(forward)[2]


def test_of_several_streams_only_those_that_are_read_are_computed() -> None:
    """As in the last of the blocks that keep text and picture apart: the text's queries go."""

    def forward(self: Formula, hidden: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        keys = torch.cat([context, hidden], 1)
        queries = torch.cat([self.linear(context), self.linear(hidden)], 1)
        return functional.scaled_dot_product_attention(queries, keys, keys)[:, TEXT:]

    assert rows_of_products(dropped(forward)[1]) == [PICTURE, PICTURE]


def test_inputs_that_nothing_reads_any_more_go() -> None:
    def forward(self: Formula, hidden: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        return self.linear(torch.cat([context, hidden], 1))[:, TEXT:]

    before, after, _ = dropped(forward)
    assert "encoder_hidden_states" in [value.name for value in before.inputs]
    assert [value.name for value in after.inputs] == ["hidden_states"]


def test_where_no_product_becomes_smaller_slices_stay() -> None:
    def forward(self: Formula, hidden: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        return (torch.cat([context, self.linear(hidden)], 1).sin() * timestep)[:, 1:]

    before, after, modified = dropped(forward)
    assert not modified
    assert show(after) == show(before)


def test_no_rows_at_all_are_none() -> None:
    def forward(self: Formula, hidden: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        return torch.cat([self.linear(hidden)[:, :0], context], 1)

    assert not dropped(forward)[2]


def test_a_batch_keeps_its_requests_apart() -> None:
    inputs = {**example(Formula(joint)), "hidden_states": torch.randn(2, PICTURE, WIDTH)}
    inputs["encoder_hidden_states"] = torch.randn(2, TEXT, WIDTH)
    program, _ = captured(Formula(joint), inputs)
    after = DropUnreadRows()(program).program
    torch.testing.assert_close(call(after, inputs), call(program, inputs), rtol=1e-6, atol=1e-6)


@torch.no_grad()
def test_flux_s_last_block_computes_no_text() -> None:
    """Its queries, MLP and output projection for the text's tokens, and its attention from them, are gone; nothing else."""
    flux, inputs = tiny_flux().double(), {name: value.double() for name, value in flux_inputs().items()}
    program = split(flux, inputs=inputs).steps["recompute"]
    after = DropUnreadRows()(program).program
    text, tokens, width = 6, 22, 32
    queries, mlp, out = width * width, 4 * width * width, 5 * width * width
    attention = 2 * tokens * width
    assert count_macs(program, CPU) - count_macs(after, CPU) == text * (queries + mlp + out + attention)
    given = [torch.rand(value.shape).to(value.dtype) for value in program.inputs]
    torch.testing.assert_close(after.module(*given), program.module(*given), rtol=1e-12, atol=1e-12)


def test_features_of_every_module_are_whole() -> None:
    whole = annotated(tiny_flux(), Granularity.MODULE, inputs=flux_inputs())
    sites = len(whole.module.graph.find_nodes(op="call_function", target=CACHE_POINT))
    program = run_passes(whole, (Specialise((0,) * sites), Simplify()))
    after = DropUnreadRows()(program).program
    assert [value.shape for value in after.outputs] == [value.shape for value in program.outputs]
    for node, value in zip(after.module.graph.output_node().args[0], after.outputs, strict=True):
        assert tuple(node.meta["val"].shape) == value.shape
