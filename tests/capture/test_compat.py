"""The parts of torch that are not public do what capture takes them to do."""

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import flex_attention

from recache_compile.capture.compat import (
    DataIsDetached,
    base_of,
    flex_attention_as,
    is_mapped,
    is_traced,
    outside_of_the_trace,
    writes,
    writes_to,
)


def exported(module: nn.Module, *inputs: Tensor) -> list[fx.Node]:
    return list(torch.export.export(module, inputs, strict=False).graph.nodes)


class Doubled(nn.Module):
    """Maps a function over the rows of its input."""

    def forward(self, hidden: Tensor) -> Tensor:
        result: Tensor = torch.vmap(lambda row: row * 2)(hidden)
        return result


class Filled(nn.Module):
    """Writes to a tensor of its own."""

    def forward(self, hidden: Tensor) -> Tensor:
        copy = hidden + 1
        copy[0] = 0
        return copy * 2


class DataWritten(nn.Module):
    """Fills a tensor through `data`."""

    def forward(self, hidden: Tensor) -> Tensor:
        rows = hidden.new_zeros(4, 3)
        rows.data[2:].copy_(torch.arange(6.0).view(2, 3))
        return torch.cat([hidden, rows])


def test_base_of_a_view_alone() -> None:
    whole = torch.ones(4)
    assert base_of(whole) is None
    assert base_of(whole[1:]) is whole
    assert base_of(whole[1:].view(3, 1)) is whole


def test_writes_to_a_tensor_are_counted_through_its_views() -> None:
    whole = torch.ones(4)
    before = writes_to(whole)
    whole[1:].add_(1)
    assert writes_to(whole) == before + 1
    with torch.inference_mode():
        assert writes_to(torch.ones(2).add_(1)) == 0


def test_traced_tensors_are_told_from_real_ones() -> None:
    assert not is_traced(torch.ones(2))
    assert not is_traced(nn.Parameter(torch.ones(2)))
    with FakeTensorMode():
        assert is_traced(torch.ones(2))
    seen = []
    torch.vmap(lambda row: seen.append(is_traced(row)) or row)(torch.ones(2, 3))
    assert seen == [True]


def test_values_are_computed_in_the_middle_of_a_trace() -> None:
    with FakeTensorMode():
        with outside_of_the_trace():
            assert torch.arange(3).sum().item() == 3
        assert is_traced(torch.arange(3))


def test_writes_to_the_data_of_a_tensor_are_seen() -> None:
    rows = torch.ones(2, 3)
    with DataIsDetached():
        program = torch.export.export(DataWritten(), (rows,), strict=False)
    torch.testing.assert_close(program.module()(rows + 1), DataWritten()(rows + 1))


def test_only_mapped_functions_are_mapped() -> None:
    rows = torch.ones(2, 3)
    assert any(map(is_mapped, exported(Doubled(), rows)))
    assert not any(map(is_mapped, exported(nn.Linear(3, 3), rows)))
    again = torch.export.export(Doubled(), (rows,), strict=False).run_decompositions({})
    assert not any(map(is_mapped, again.graph.nodes))


def test_only_calls_that_write_write() -> None:
    assert any(map(writes, exported(Filled(), torch.ones(2, 3))))
    assert not any(map(writes, exported(nn.Linear(3, 3), torch.ones(2, 3))))


def test_flex_attention_is_replaced_for_a_while() -> None:
    original = flex_attention.flex_attention
    with flex_attention_as(lambda *args: "attended"):
        assert flex_attention.flex_attention(None, None, None) == "attended"
    assert flex_attention.flex_attention is original
