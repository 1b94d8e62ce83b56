"""Engines read what a patch makes of their weights, or their own, whatever fails on the way."""

from collections.abc import Mapping, Sequence

import pytest
import torch
from torch import Tensor
from typing_extensions import override

from recache_compile.compiler.overlay import Change, Overlay, Patch
from recache_compile.errors import ModelError
from recache_compile.runtimes.base import Engine

CPU = torch.device("cpu")


class Told(Engine):
    """An engine that knows where its weights are."""

    def __init__(self, own: Mapping[str, Tensor]) -> None:
        self.weights = dict(own)
        self.is_broken = False

    @override
    def __call__(self, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        raise NotImplementedError

    @override
    def use(self, weights: Mapping[str, Tensor]) -> None:
        if self.is_broken:
            raise ZeroDivisionError
        self.weights = dict(weights)


class Model:
    """Two engines of weights x and y."""

    def __init__(self) -> None:
        self.own = {"x": torch.full((2,), 1.0), "y": torch.full((2,), 10.0)}
        self.engines = [Told(self.own), Told(self.own)]
        self.overlay = Overlay()

    def read(self, key: str | None, patch: Patch | None = None) -> list[list[float]]:
        """The first number of each weight as the engines read it under a key."""
        patch = patch or Patch()
        with self.overlay.reading(key, lambda: self.overlay.lay(patch, self.own, self.engines, CPU)):
            return [[engine.weights[name][0].item() for name in self.own] for engine in self.engines]

    def own_values(self) -> list[list[float]]:
        """What engines read of their own."""
        return [[weight[0].item() for weight in self.own.values()]] * 2


def scaled(name: str, factor: float) -> Change:
    """A weight times a factor."""

    def write(base: Mapping[str, Tensor], out: Mapping[str, Tensor]) -> None:
        torch.mul(base[name], factor, out=out[name])

    return Change({name: None}, write)


def failing(name: str) -> Change:
    """A weight that is written to before it fails."""

    def write(base: Mapping[str, Tensor], out: Mapping[str, Tensor]) -> None:
        out[name].fill_(float("nan"))
        raise ZeroDivisionError

    return Change({name: None}, write)


DOUBLE = Patch(changes=(scaled("x", 2), scaled("y", 2)))


def test_the_own_ones_are_never_written_to_and_come_back() -> None:
    model = Model()
    own = {name: (weight.data_ptr(), weight.clone()) for name, weight in model.own.items()}
    assert model.read("double", DOUBLE) == [[2, 20]] * 2
    places = {name: weight.data_ptr() for name, weight in model.overlay.weights.items()}
    assert model.read("triple", Patch(changes=(scaled("x", 3), scaled("y", 3)))) == [[3, 30]] * 2
    assert {name: weight.data_ptr() for name, weight in model.overlay.weights.items()} == places
    assert model.read(None) == model.own_values()
    assert model.overlay.weights == {}
    for engine in model.engines:
        for name, (pointer, weight) in own.items():
            assert engine.weights[name].data_ptr() == pointer
            assert torch.equal(engine.weights[name], weight)


def test_what_was_made_of_older_weights_is_made_anew() -> None:
    model = Model()
    model.read("double", DOUBLE)
    with model.overlay.alone():
        model.own["x"].fill_(5)
        assert model.read("double", DOUBLE) == [[2, 20]] * 2
        model.overlay.forget()
    assert model.read("double", DOUBLE) == [[10, 20]] * 2


@pytest.mark.parametrize("before", [None, "double"])
@pytest.mark.parametrize("after", [None, "double"])
def test_a_patch_that_fails_halfway_is_gone_with_the_next(before: str | None, after: str | None) -> None:
    model = Model()
    patches = {None: Patch(), "double": DOUBLE}
    model.read(before, patches[before])
    with pytest.raises(ZeroDivisionError):
        model.read("broken", Patch(changes=(scaled("x", 7), failing("y"))))
    assert model.read(after, patches[after]) == (model.own_values() if after is None else [[2, 20]] * 2)


@pytest.mark.parametrize("after", [None, "double"])
def test_where_one_engine_was_told_and_the_next_failed_both_are_told_anew(after: str | None) -> None:
    model = Model()
    model.engines[1].is_broken = True
    with pytest.raises(ZeroDivisionError):
        model.read("double", DOUBLE)
    model.engines[1].is_broken = False
    found = model.read(after, DOUBLE if after else Patch())
    assert found == ([[2, 20]] * 2 if after else model.own_values())


def test_what_does_not_fit_changes_nothing() -> None:
    model = Model()
    model.read("double", DOUBLE)
    with pytest.raises(ModelError, match=r"z: no weights of the engines"):
        model.read("unknown", Patch({"z": torch.ones(2)}))
    with pytest.raises(ModelError, match=r"x is \[3\], compiled \[2\]"):
        model.read("longer", Patch({"x": torch.ones(3)}))
    assert [engine.weights["x"][0].item() for engine in model.engines] == [2, 2]


def test_a_given_tensor_is_read_where_it_is_if_it_lies_as_the_own_one() -> None:
    model, same, other = Model(), torch.full((2,), 3.0), torch.full((2,), 4, dtype=torch.int32)
    assert model.read("given", Patch({"x": same, "y": other})) == [[3, 4]] * 2
    assert model.engines[0].weights["x"] is same
    assert model.engines[0].weights["y"].dtype == torch.float32
