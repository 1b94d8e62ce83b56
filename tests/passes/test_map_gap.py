"""Forecast programs that serve a whole gap, against the program of one step."""

import pytest
import torch
from torch import nn

from recache_compile.capture.export import flatten
from recache_compile.ir.program import Granularity, Program
from recache_compile.ir.value import Kind
from recache_compile.passes.base import run_passes
from recache_compile.passes.hoist import Hoist
from recache_compile.passes.map_gap import map_over_gap
from recache_compile.passes.map_over import drop_unit_dimensions
from recache_compile.passes.simplify import Simplify
from recache_compile.passes.specialise import Specialise
from tests.passes.tiny import Attention, annotated


def forecast(module: nn.Module, granularity: Granularity = Granularity.STACK) -> Program:
    whole = annotated(module, granularity)
    sites = sum(node.target is torch.ops.recache.cache_point.default for node in whole.module.graph.nodes)
    return run_passes(whole, (Specialise((2,) * sites), Hoist(), Simplify())).renamed("forecast")


@pytest.mark.parametrize("steps", [2, 3, 7])
def test_a_gap_equals_its_steps_one_by_one(steps: int) -> None:
    single = forecast(Attention())
    whole = map_over_gap(single)
    assert whole.serves_gaps
    assert not single.serves_gaps
    own = (Kind.COEFFICIENTS, Kind.TABLE_ROW)
    given = [torch.randn([steps if size is None else size for size in value.shape]) for value in whole.inputs]
    predictions = whole.module(*given)
    for step in range(steps):
        mine = [x[step] if value.kind in own else x for value, x in zip(whole.inputs, given, strict=True)]
        for expected, result in zip(single.module(*mine), predictions, strict=True):
            torch.testing.assert_close(result[step], expected, rtol=1e-5, atol=1e-6)
    assert [value.name for value in whole.inputs] == [value.name for value in single.inputs]
    assert whole.weights.keys() == single.weights.keys()


def test_a_prediction_that_depends_on_the_latents_is_made_step_by_step() -> None:
    single = forecast(Attention(), Granularity.BLOCK)
    assert Kind.LATENTS in [value.kind for value in single.inputs]
    assert map_over_gap(single) is single


def test_dimensions_of_size_one_are_left_out_between_two_reshapes() -> None:
    """As when the patches of a video are put together, which takes eight dimensions without the steps."""

    class Patches(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.reshape(3, 1, 2, 4, 1, 5).permute(0, 1, 5, 2, 4, -3).reshape(3, 5, 8)

    exported = torch.export.export(Patches(), (torch.randn(3, 40),))
    graph = flatten(exported, {}, "constant")
    drop_unit_dimensions(graph.graph)
    graph.recompile()
    (permute,) = graph.graph.find_nodes(op="call_function", target=torch.ops.aten.permute.default)
    assert permute.args[1] == [0, 3, 1, 2]
    given = torch.randn(3, 40)
    assert torch.equal(graph(given)[0], Patches()(given))
    assert permute.meta["val"].shape == (3, 5, 2, 4)
