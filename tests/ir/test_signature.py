"""Kinds of calls: what one set of engines serves."""

from typing import Any

import pytest
import torch

from recache_compile.ir.signature import call_kind, named_leaves, open_objects
from recache_compile.ir.value import Kind, Value

CALL: dict[str, Any] = {"sample": torch.zeros(1, 2), "scale": 1.0, "mode": "sin", "extra": None}


def test_calls_of_other_values_in_another_order_are_of_one_kind() -> None:
    other = {**dict(reversed(CALL.items())), "sample": torch.ones(1, 2)}
    assert call_kind(other) == call_kind(CALL)
    assert hash(call_kind(other)) == hash(call_kind(CALL))


@pytest.mark.parametrize(
    "change",
    [
        {"sample": torch.zeros(1, 3)},
        {"sample": torch.zeros(1, 2, 1)},
        {"sample": torch.zeros(1, 2, dtype=torch.float64)},
        {"sample": None},
        {"scale": 2.0},
        {"scale": torch.zeros(())},
        {"mode": "cos"},
        {"extra": 0},
        {"more": torch.zeros(1)},
    ],
    ids=str,
)
def test_other_shapes_types_and_constants_are_other_kinds(change: dict[str, Any]) -> None:
    assert call_kind(CALL | change) != call_kind(CALL)


def test_a_description_is_of_the_kind_of_its_tensors() -> None:
    constants = {name: repr(leaf) for name, leaf in CALL.items() if name != "sample"}
    described = {"sample": Value("sample", Kind.LATENTS, (1, 2), torch.float32)}
    assert call_kind(described, constants) == call_kind({"sample": CALL["sample"]}, constants) == call_kind(CALL)
    assert call_kind(described, constants | {"more": "1"}) != call_kind(CALL)


class Holder:
    """A key-value cache, say."""

    def __init__(self, keys: Any, inner: Any) -> None:
        self.keys, self.inner, self.count = keys, inner, 3


def test_leaves_of_objects_have_the_same_names_before_and_after_torch_may_look_into_them() -> None:
    arguments = {"cache": [Holder(torch.ones(2), Holder(torch.ones(3), None))], "x": torch.ones(1)}
    before = named_leaves(arguments)
    assert list(before) == [
        *("cache.0.count", "cache.0.inner.count", "cache.0.inner.inner", "cache.0.inner.keys", "cache.0.keys"),
        "x",
    ]
    open_objects(arguments)
    after = named_leaves(arguments)
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)
