from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from recache_compile.passes.find_cache_sites import block_of
from recache_compile.passes.residual_paths import residual_base
from tests.passes.tiny import TOKENS, WIDTH, aten, captured

Function = Callable[["Inner", Tensor, Tensor], Tensor | tuple[Tensor, ...]]


class Inner(nn.Module):
    """A block given as a function of (self, stream, text stream), with some weights to use."""

    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.table = nn.Parameter(torch.randn(1, TOKENS, WIDTH))

    def forward(self, hidden: Tensor, text: Tensor) -> Tensor | tuple[Tensor, ...]:
        return self.function(self, hidden, text)


class Outer(nn.Module):
    """The streams are called `tanh` (tokens of the latents) and `sigmoid` (text) in the graph."""

    def __init__(self, function: Function) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Inner(function)])

    def forward(self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> object:
        return self.blocks[0](hidden_states.tanh(), encoder_hidden_states.sigmoid())


def bases(function: Function) -> list[str | None]:
    """Name of the base of each result of a block."""
    program, made = captured(Outer(function))

    def inside(node: fx.Node) -> bool:
        return block_of(node, made.containers) is not None

    (results,) = program.module.graph.output_node().args
    found = [residual_base(result, inside) for result in results]
    return [None if base is None else base.name for base in found]


def joined(self: Inner, hidden: Tensor, text: Tensor, dim: int = 1) -> Tensor:
    both = torch.cat([text, hidden], dim)
    return both + self.linear(both)


@pytest.mark.parametrize(
    "function",
    [
        lambda self, hidden, text: hidden + self.linear(hidden),
        lambda self, hidden, text: self.linear(hidden) + hidden,
        lambda self, hidden, text: hidden + text.mean(1, True) * self.linear(hidden),
        lambda self, hidden, text: hidden + self.table,
        lambda self, hidden, text: hidden + 1,
    ],
    ids=["plain", "stream last", "gated", "weight", "number"],
)
def test_the_summand_from_outside_is_the_base(function: Function) -> None:
    assert bases(function) == ["tanh"]


def test_several_additions_lead_to_the_same_base() -> None:
    def function(self: Inner, hidden: Tensor, text: Tensor) -> Tensor:
        for _ in range(3):
            hidden = hidden + self.linear(self.norm(hidden))
        return hidden

    assert bases(function) == ["tanh"]


def test_an_addition_in_place_is_an_addition() -> None:
    def function(self: Inner, hidden: Tensor, text: Tensor) -> Tensor:
        hidden = hidden.clone()
        hidden += self.linear(hidden)
        return hidden

    assert bases(function) == ["tanh"]


@pytest.mark.parametrize(
    "change",
    [
        lambda value: value.to(torch.float64).to(torch.float32),
        lambda value: value.clone(),
        lambda value: value.contiguous(),
        lambda value: value.detach(),
        lambda value: value.clamp(-65504, 65504),
        lambda value: value.clip(-65504, 65504),
        lambda value: functional.dropout(value, 0.5, False),
    ],
    ids=["casts", "clone", "contiguous", "detach", "clamp", "clip, as FLUX in float16", "dropout"],
)
def test_what_changes_no_value_is_looked_through(change: Callable[[Tensor], Tensor]) -> None:
    assert bases(lambda self, hidden, text: change(change(hidden) + self.linear(hidden))) == ["tanh"]


@pytest.mark.parametrize(
    "parts",
    [
        lambda both: (both[:, :2], both[:, 2:]),
        lambda both: (both[:, :-3], both[:, -3:]),
        lambda both: both.split([2, 3], 1),
        lambda both: both.split([2, 3], dim=-2),
    ],
    ids=["slices", "from the end", "split", "dimension from the end"],
)
def test_two_streams_in_one_have_a_base_each(parts: Callable[[Tensor], tuple[Tensor, ...]]) -> None:
    """As in FLUX's single blocks."""
    assert bases(lambda self, hidden, text: tuple(parts(joined(self, hidden, text)))) == ["sigmoid", "tanh"]


def test_equal_streams_in_one_are_told_apart() -> None:
    def function(self: Inner, hidden: Tensor, text: Tensor) -> tuple[Tensor, ...]:
        both = torch.cat([hidden.cos(), hidden], 1)
        return tuple((both + self.linear(both)).chunk(2, 1))

    assert bases(function) == [None, "tanh"]


def test_an_addition_behind_the_parts_is_followed_too() -> None:
    def function(self: Inner, hidden: Tensor, text: Tensor) -> Tensor:
        stream = joined(self, hidden, text)[:, 2:]
        return stream + self.linear(stream)

    assert bases(function) == ["tanh"]


def added_to_parts(self: Inner, hidden: Tensor, text: Tensor) -> Tensor:
    first, second = hidden.split([1, 2], 1)
    return torch.cat([first, second + self.linear(second)], 1) + self.linear(hidden)


def added_to_slices(self: Inner, hidden: Tensor, text: Tensor) -> Tensor:
    return torch.cat([hidden[:, :1] + text.mean(1, True), hidden[:, 1:]], 1) + self.linear(hidden)


@pytest.mark.parametrize("function", [added_to_parts, added_to_slices])
def test_a_stream_whose_parts_are_joined_again_is_carried_on(function: Function) -> None:
    """As in Helios, where the frames before are not added to."""
    assert bases(function) == ["tanh"]


def test_a_slice_from_outside_counts_as_one_from_outside() -> None:
    """Views that are written to are taken anew where they are read."""
    graph = fx.Graph()
    both = graph.placeholder("both")
    stream = graph.call_function(aten.slice.Tensor, (both, 1, 0, 3))
    total = graph.call_function(aten.add.Tensor, (stream, stream))
    both.meta["val"], stream.meta["val"], total.meta["val"] = (
        torch.ones(1, 5, 2),
        torch.ones(1, 3, 2),
        torch.ones(1, 3, 2),
    )
    assert residual_base(total, lambda node: node is not both) is stream


@pytest.mark.parametrize(
    "function",
    [
        lambda self, hidden, text: torch.cat([hidden[:, 1:], hidden[:, :1]], 1) + self.linear(hidden),
        lambda self, hidden, text: torch.cat([text, text], 1)[:, :3] + self.linear(hidden),
        lambda self, hidden, text: joined(self, hidden, text)[:, 1:4],
        lambda self, hidden, text: joined(self, hidden, text)[:, 2:4],
        lambda self, hidden, text: joined(self, hidden, text),
        lambda self, hidden, text: torch.cat([hidden, hidden], -1)[..., 2:6] + self.linear(hidden),
        lambda self, hidden, text: torch.cat([hidden, self.linear(hidden)], -1)[:, :2],
    ],
    ids=[
        "parts that changed places",
        "twice the same",
        "across two",
        "a part of one",
        "both",
        "across two channels",
        "another dimension",
    ],
)
def test_a_window_that_is_no_stream_has_no_base(function: Function) -> None:
    assert bases(function) == [None]


@pytest.mark.parametrize(
    "function",
    [
        lambda self, hidden, text: self.norm(hidden + self.linear(hidden)),
        lambda self, hidden, text: (hidden + self.linear(hidden)) * 0.5,
        lambda self, hidden, text: torch.add(self.linear(hidden), hidden, alpha=2),
        lambda self, hidden, text: self.linear(hidden),
        lambda self, hidden, text: self.linear(hidden) + hidden.mean(1, keepdim=True),
        lambda self, hidden, text: self.linear(hidden).transpose(1, 2) + text.mean(),
        lambda self, hidden, text: self.linear(hidden) - hidden,
    ],
    ids=["post-norm", "scaled sum", "scaled summand", "no sum", "other shape", "scalar", "difference"],
)
def test_a_stream_that_is_not_carried_on_has_no_base(function: Function) -> None:
    assert bases(function) == [None]


def base_among(outside: set[str], function: Function) -> str | None:
    """Name of the base where the named nodes alone are outside."""
    program, _ = captured(Outer(function))
    result = program.module.graph.output_node().args[0][0]
    base = residual_base(result, lambda node: node.name not in outside)
    return None if base is None else base.name


def test_of_two_summands_from_outside_the_one_in_front_is_the_base() -> None:
    def function(self: Inner, hidden: Tensor, text: Tensor) -> Tensor:
        return hidden + text.mean(1, True).expand(1, 3, 4)

    assert base_among({"tanh", "expand"}, function) == "tanh"
    assert base_among({"expand"}, function) == "expand"


def test_the_stream_goes_before_what_is_added_to_it_last() -> None:
    """As where a control signal is added behind a block: additions are written stream first."""

    def function(self: Inner, hidden: Tensor, text: Tensor) -> Tensor:
        return hidden + self.linear(hidden) + text.mean(1, True).expand(1, 3, 4)

    assert base_among({"tanh", "expand"}, function) == "tanh"


def test_whole_numbers_are_no_base() -> None:
    graph = fx.Graph()
    stream, more = graph.placeholder("stream"), graph.placeholder("more")
    total = graph.call_function(aten.add.Tensor, (stream, more))
    stream.meta["val"], more.meta["val"] = torch.ones(2, dtype=torch.int64), torch.ones(2)
    total.meta["val"] = torch.ones(2)
    assert residual_base(total, lambda node: node is total) is more
