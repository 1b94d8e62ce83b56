import pytest
import torch
from torch import Tensor, fx
from torch.nn import functional

from recache_compile.capture.export import export_module
from recache_compile.passes.map_rows import use_free_row_rules
from tests.passes.tiny import aten, show_graph

cat, layer_norm = torch.ops.recache.cat.default, torch.ops.recache.layer_norm.default
index_select = torch.ops.recache.index_select.default


def loop(function: object, *rows: Tensor) -> Tensor:
    """What `torch.vmap` means."""
    return torch.stack([function(*row) for row in zip(*rows, strict=True)])


class Mapped(torch.nn.Module):
    """A function mapped over the rows of its argument."""

    def __init__(self, function: object) -> None:
        super().__init__()
        self.function = function

    def forward(self, rows: Tensor) -> Tensor:
        return torch.vmap(self.function)(rows)


@pytest.mark.parametrize("dim", [0, 1, -1, -2])
def test_cat_equals_torch_and_maps_over_rows(dim: int) -> None:
    rows = torch.randn(5, 2, 3)
    fixed = torch.randn(2, 3)
    assert torch.equal(cat([rows[0], fixed], dim), torch.cat([rows[0], fixed], dim))
    expected = loop(lambda row: torch.cat([row, fixed, row], dim), rows)
    assert torch.equal(torch.vmap(lambda row: cat([row, fixed, row], dim))(rows), expected)
    assert torch.equal(
        torch.vmap(lambda row: cat([fixed, row, row], dim))(rows),
        torch.cat([fixed.expand(5, 2, 3), rows, rows], dim + 1 if dim >= 0 else dim),
    )


def test_cat_maps_over_rows_that_are_not_the_first_dimension() -> None:
    rows = torch.randn(2, 5, 3)
    mapped = torch.vmap(lambda row: cat([row, 2 * row], 1), in_dims=1)(rows)
    assert torch.equal(mapped, torch.cat([rows, 2 * rows], 2).movedim(1, 0))


@pytest.mark.parametrize("dim", [0, 2, -2])
@pytest.mark.parametrize("shape", [(), (4,)])
def test_index_select_equals_torch_and_maps_over_rows(dim: int, shape: tuple[int, ...]) -> None:
    rows, places = torch.randn(5, 2, 2, 2), torch.randint(2, (5, *shape))
    fixed, place = rows[0], places[0]
    assert torch.equal(index_select(fixed, dim, place), fixed.index_select(dim, place))
    for values, indices in ((rows, places), ([fixed] * 5, places), (rows, [place] * 5)):
        expected = torch.stack([value.index_select(dim, index) for value, index in zip(values, indices, strict=True)])
        in_dims = tuple(0 if isinstance(each, Tensor) else None for each in (values, indices))
        given = tuple(each if isinstance(each, Tensor) else each[0] for each in (values, indices))
        mapped = torch.vmap(lambda value, index: index_select(value, dim, index), in_dims)(*given)
        assert torch.equal(mapped, expected)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("shape", [[4], [3, 4]])
def test_layer_norm_equals_torch_and_maps_over_rows(shape: list[int], affine: bool) -> None:
    rows = torch.randn(5, 2, 3, 4)
    weight, bias = (torch.randn(shape), torch.randn(shape)) if affine else (None, None)

    def expected(row: Tensor) -> Tensor:
        return functional.layer_norm(row, shape, weight, bias, 1e-3)

    assert torch.equal(layer_norm(rows[0], shape, weight, bias, 1e-3), expected(rows[0]))
    mapped = torch.vmap(lambda row: layer_norm(row, shape, weight, bias, 1e-3))(rows)
    torch.testing.assert_close(mapped, loop(expected, rows))
    moved = torch.vmap(lambda row: layer_norm(row, shape, weight, bias, 1e-3), in_dims=1)(rows.movedim(0, 1))
    torch.testing.assert_close(moved, mapped)


def test_layer_norm_maps_over_a_scale_per_row() -> None:
    value, scales = torch.randn(3, 4), torch.randn(5, 4)
    mapped = torch.vmap(lambda scale: layer_norm(value, [4], scale, None, 1e-5))(scales)
    torch.testing.assert_close(mapped, loop(lambda scale: functional.layer_norm(value, [4], scale), scales))


@pytest.mark.parametrize(
    "function",
    [
        lambda row: cat([row, row], -1),
        lambda row: cat([row, torch.ones(2, 3)], 0),
        lambda row: layer_norm(row, [3], None, None, 1e-5),
    ],
    ids=["cat", "cat with a fixed part", "layer_norm"],
)
def test_our_rules_leave_the_number_of_rows_free(function: object) -> None:
    free = {"rows": {0: torch.export.Dim("rows", min=2)}}
    exported = export_module(Mapped(function), (torch.randn(3, 2, 3),), {}, dynamic_shapes=free).module()
    for count in (2, 7):
        rows = torch.randn(count, 2, 3)
        torch.testing.assert_close(exported(rows), loop(function, rows))


def test_cat_and_layer_norm_of_a_graph_get_our_rules() -> None:
    graph = fx.Graph()
    value, weight = graph.placeholder("value"), graph.placeholder("weight")
    joined = graph.call_function(aten.cat.default, ([value, value],))
    turned = graph.call_function(aten.cat.default, ([joined, value], -1))
    plain = graph.call_function(aten.layer_norm.default, (turned, [4]))
    scaled = graph.call_function(aten.layer_norm.default, (plain, [4], weight))
    full = graph.call_function(aten.layer_norm.default, (scaled, [4], None, None, 1e-6))
    graph.output([full])
    use_free_row_rules(graph)
    graph.lint()
    assert (
        show_graph(graph)
        == """\
value: input
weight: input
cat_default = recache.cat.default([value, value], 0)
cat_default_1 = recache.cat.default([cat_default, value], -1)
layer_norm_default = recache.layer_norm.default(cat_default_1, [4], None, None, 1e-05)
layer_norm_default_1 = recache.layer_norm.default(layer_norm_default, [4], weight, None, 1e-05)
layer_norm_default_2 = recache.layer_norm.default(layer_norm_default_1, [4], None, None, 1e-06)
return [layer_norm_default_2]"""
    )


def test_other_operators_keep_their_own_rule() -> None:
    graph = fx.Graph()
    value = graph.placeholder("value")
    graph.output([graph.call_function(aten.stack.default, ([value, value], 1))])
    before = show_graph(graph)
    use_free_row_rules(graph)
    assert show_graph(graph) == before
