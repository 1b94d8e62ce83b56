"""The parts of torch that are not public do what capture takes them to do."""

from typing import Any

import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from diffusers.hooks.hooks import HookRegistry
from diffusers.hooks.hooks import ModelHook as DiffusersHook
from torch import Tensor, fx, nn
from torch.nn.attention import flex_attention

from recache_compile.capture.compat import (
    FakeTensorMode,
    TorchDispatchMode,
    TraceableWrites,
    WeakTensorKeyDictionary,
    arguments_of,
    base_of,
    detect_fake_mode,
    flex_attention_as,
    hooks_of,
    is_mapped,
    is_offloaded,
    is_operator,
    is_traced,
    on_values,
    outside_of_the_trace,
    progress_bar_of,
    uncompiled,
    writes,
    writes_to,
)
from recache_compile.pipelines.load import load_pipeline
from tests.conftest import tiny_flux


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


def test_operators_are_called_on_values_with_free_sizes() -> None:
    free = ({0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC},)
    program = torch.export.export(nn.Linear(4, 5), (torch.ones(3, 2, 4),), dynamic_shapes=free, strict=False)
    weight, _, value = (node.meta["val"] for node in program.graph.find_nodes(op="placeholder"))
    with on_values([weight, value]):
        made = torch.ops.aten.linear.default(value, weight)
    assert made.shape == (*value.shape[:2], 5)
    assert detect_fake_mode(made) is detect_fake_mode(value)


def test_values_are_computed_in_the_middle_of_a_trace() -> None:
    with FakeTensorMode():
        with outside_of_the_trace():
            assert torch.arange(3).sum().item() == 3
        assert is_traced(torch.arange(3))


def test_writes_to_the_data_of_a_tensor_are_seen() -> None:
    rows = torch.ones(2, 3)
    with TraceableWrites():
        program = torch.export.export(DataWritten(), (rows,), strict=False)
    torch.testing.assert_close(program.module()(rows + 1), DataWritten()(rows + 1))


class DiagonalFilled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        mask = torch.zeros(4, 5)
        mask[:3, :3].fill_diagonal_(2.0)
        return x + mask


def test_a_diagonal_that_is_filled_through_a_view_can_be_made_functional() -> None:
    x = torch.randn(4, 5)
    with TraceableWrites():
        program = torch.export.export(DiagonalFilled(), (x,), strict=False).run_decompositions({})
    torch.testing.assert_close(program.module()(x), DiagonalFilled()(x))


def test_only_mapped_functions_are_mapped() -> None:
    rows = torch.ones(2, 3)
    assert any(map(is_mapped, exported(Doubled(), rows)))
    assert not any(map(is_mapped, exported(nn.Linear(3, 3), rows)))
    again = torch.export.export(Doubled(), (rows,), strict=False).run_decompositions({})
    assert not any(map(is_mapped, again.graph.nodes))


def test_only_calls_that_write_write() -> None:
    assert any(map(writes, exported(Filled(), torch.ones(2, 3))))
    assert not any(map(writes, exported(nn.Linear(3, 3), torch.ones(2, 3))))


def test_arguments_of_an_operator_are_told_by_name() -> None:
    nodes = exported(nn.Linear(3, 3), torch.ones(2, 3))
    (linear,) = filter(is_operator, nodes)
    assert list(arguments_of(linear)) == ["input", "weight", "bias"]
    assert arguments_of(linear)["input"] is nodes[2]


def test_hooks_of_offloading_and_caches_are_known() -> None:
    plain, offloaded, cached = nn.Linear(2, 2), nn.Linear(2, 2), tiny_flux()
    add_hook_to_module(offloaded, ModelHook())
    HookRegistry.check_if_exists_or_initialize(cached).register_hook(DiffusersHook(), "mine")
    assert [is_offloaded(module) for module in (plain, offloaded, cached)] == [False, True, False]
    assert [hooks_of(module) for module in (plain, offloaded, cached)] == [(), (), ("mine",)]


def test_compiled_modules_are_unwrapped() -> None:
    module = nn.Linear(2, 2)
    assert uncompiled(torch.compile(module)) is module
    assert uncompiled(module) is module


def test_progress_bars_are_told() -> None:
    pipeline = load_pipeline("shapes")
    pipeline.set_progress_bar_config(disable=True)
    assert progress_bar_of(pipeline) == {"disable": True}


def test_modes_that_are_borrowed_from_torch_work() -> None:
    seen: list[str] = []

    class Noting(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    first, second = torch.ones(2), torch.ones(2)
    with Noting():
        first + second
    assert seen == ["aten.add.Tensor"]
    known = WeakTensorKeyDictionary({first: 1})
    assert first in known
    assert second not in known
    with FakeTensorMode() as mode:
        assert detect_fake_mode([torch.ones(2)]) is mode
    assert detect_fake_mode([first]) is None


def test_flex_attention_is_replaced_for_a_while() -> None:
    original = flex_attention.flex_attention
    with flex_attention_as(lambda *args: "attended"):
        assert flex_attention.flex_attention(None, None, None) == "attended"
    assert flex_attention.flex_attention is original
