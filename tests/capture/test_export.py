"""The door to `torch.export`: flat, functional graphs that read no values where shapes do."""

import pytest
import torch
from torch import Tensor, fx, nn

from recache_compile.capture.export import export_module, flatten
from recache_compile.ir.program import get_attribute
from recache_compile.ir.signature import named_leaves

aten = torch.ops.aten
X = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))


class Model(nn.Module):
    """A `forward` given as a function of (self, x)."""

    def __init__(self, function: object) -> None:
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> object:
        result = self.function(self, x)  # type: ignore[operator]
        return result if isinstance(result, tuple) else (result,)


def flat(function: object, x: Tensor = X) -> fx.GraphModule:
    """The graph of a function, once it is known to compute the same."""
    model = Model(function)
    module = flatten(export_module(model, (x,), {}), {id(model.weight): "weight"}, "constant")
    for actual, expected in zip(module(x + 1), model(x + 1), strict=True):
        torch.testing.assert_close(actual, expected)
    return module


def calls(module: fx.GraphModule) -> list[str]:
    return [str(node.target) for node in module.graph.nodes if node.op == "call_function"]


def names(module: fx.GraphModule) -> list[str]:
    return sorted({str(node.target) for node in module.graph.find_nodes(op="get_attr")})


def test_views_become_reshapes() -> None:
    module = flat(lambda self, x: (x.view(6, 4), x.view(2, -1), x[0].view_as(x[1]), x.flatten().reshape_as(x)))
    assert not {"aten.view.default", "aten.view_as.default", "aten.reshape_as.default"} & set(calls(module))
    assert torch.equal(module(X.transpose(1, 2).contiguous().transpose(1, 2))[0], X.reshape(6, 4))


def test_bits_seen_as_another_type_stay_a_view() -> None:
    assert calls(flat(lambda self, x: x.view(torch.int32))) == ["aten.view.dtype"]


FILLS = {
    "zeros_like": lambda self, x: torch.zeros_like(x),
    "ones_like": lambda self, x: torch.ones_like(x, dtype=torch.bool),
    "full_like": lambda self, x: torch.full_like(x, 2.5),
    "new_zeros": lambda self, x: x.new_zeros(2, 5),
    "new_ones": lambda self, x: x.new_ones(2, dtype=torch.int64),
    "new_full": lambda self, x: x.new_full((3,), 7),
}


@pytest.mark.parametrize("function", FILLS.values(), ids=FILLS.keys())
def test_what_is_filled_in_the_shape_of_a_value_does_not_read_it(function: object) -> None:
    module = flat(function)
    assert calls(module) == ["aten.full.default"]
    assert not module.graph.find_nodes(op="placeholder")[0].users


def test_the_type_and_shape_of_another_value_are_written_out() -> None:
    module = flat(lambda self, x: (self.weight.double().type_as(x), self.weight.expand_as(x)))
    assert {"aten.to.dtype", "aten.expand.default"} <= set(calls(module))
    assert not module.graph.find_nodes(op="placeholder")[0].users


def test_writes_become_values() -> None:
    def function(self: Model, x: Tensor) -> Tensor:
        result = x.new_zeros(2, 5, 4)
        result[:, 1:4] = x
        return result.mul_(2)

    assert not [call for call in calls(flat(function)) if call.partition(".default")[0].endswith("_")]


def test_a_mapped_function_becomes_what_it_does() -> None:
    module = flat(lambda self, x: torch.vmap(lambda row: row * self.weight)(x))
    assert all(call.startswith("aten.") for call in calls(module))


def test_regions_without_gradients_are_inlined() -> None:
    def function(self: Model, x: Tensor) -> Tensor:
        with torch.enable_grad():
            return x * 2

    assert calls(flat(function)) == ["aten.mul.Tensor"]


def test_weights_keep_their_name_and_equal_constants_have_one() -> None:
    ones, same, other = torch.ones(4), torch.ones(4), torch.ones(4, dtype=torch.float64)
    module = flat(lambda self, x: x * self.weight + ones + same + other)
    assert len(names(module)) == 3
    assert [name for name in names(module) if not name.startswith("constant_")] == ["weight"]
    assert {get_attribute(module, name).dtype for name in names(module)} == {torch.float32, torch.float64}


def test_an_example_that_is_a_view_needs_no_guard() -> None:
    wide = torch.randn(4, 3, 4)
    module = flat(lambda self, x: (x + 1).reshape(-1).mul_(2), wide[:2])
    assert torch.equal(module(X)[0], ((X + 1) * 2).reshape(-1))


class Cache:
    def __init__(self) -> None:
        self.value, self.key = torch.zeros(1), torch.ones(1)
        self.layers = [Inner(), Inner()]
        self.mode = "read"


class Inner:
    def __init__(self) -> None:
        self.key = torch.ones(2)


def test_names_of_nested_leaves() -> None:
    given = {"x": X, "pair": (X, 2), "options": {"scale": 0.5, "none": None}}
    assert list(named_leaves(given)) == ["x", "pair.0", "pair.1", "options.scale", "options.none"]


def test_plain_arguments_are_their_own_leaves() -> None:
    given = {"x": X, "mode": "read", "none": None}
    assert named_leaves(given) == given


def test_the_attributes_of_an_object_are_leaves_in_the_order_of_their_names() -> None:
    cache = Cache()
    leaves = named_leaves({"x": X, "cache": cache})
    assert list(leaves) == ["x", "cache.key", "cache.layers.0.key", "cache.layers.1.key", "cache.mode", "cache.value"]
    assert leaves["cache.layers.1.key"] is cache.layers[1].key


def test_modules_and_functions_among_the_arguments_are_leaves() -> None:
    linear = nn.Linear(2, 2)
    assert named_leaves({"module": linear, "function": len, "dtype": torch.float32}) == {
        "module": linear,
        "function": len,
        "dtype": torch.float32,
    }


def test_tables_that_the_code_makes_on_the_host_are_moved_to_the_device() -> None:
    """The meta device stands for a GPU."""

    def on_the_host(self: Model, x: Tensor) -> Tensor:
        positions = torch.arange(4, device="cpu") * self.table
        return x * positions.to(x.device) + self.weight

    model = Model(on_the_host).to("meta")
    model.table = torch.full((4,), 2.0)
    meta = torch.device("meta")
    module = flatten(export_module(model, (X.to(meta),), {}), {id(model.weight): "weight"}, "constant", meta)
    weights = [get_attribute(module, name) for name in names(module)]
    traced = [value for node in module.graph.nodes if isinstance(value := node.meta.get("val"), Tensor)]
    assert {each.device for each in (*weights, *traced)} == {meta}
    assert "cpu" not in str(module.graph)
