"""A transformer finds the pipeline that calls it, whoever made it and whatever is called between them."""

from collections.abc import Callable
from typing import Any

from torch import nn
from typing_extensions import override

from recache_compile.pipelines.callers import DEPTH, calling_pipeline


class Asking(nn.Module):
    """A transformer that asks who calls."""

    @override
    def forward(self) -> Any:
        return calling_pipeline(self)


class Pipeline:
    """What calls a transformer."""

    def __init__(self, transformer: nn.Module, between: Callable[[Callable[[], Any]], Any] = lambda call: call()):
        self.transformer, self.between = transformer, between

    @property
    def components(self) -> dict[str, nn.Module]:
        """Its parts."""
        return {"transformer": self.transformer}

    def __call__(self) -> Any:
        return self.between(self.transformer)


def deeper(calls: int, call: Callable[[], Any]) -> Any:
    """A call inside of so many others."""
    return call() if calls == 0 else deeper(calls - 1, call)


def test_each_pipeline_that_has_it_is_found() -> None:
    transformer = Asking()
    one, other = Pipeline(transformer), Pipeline(transformer)
    assert one() is one
    assert other() is other


def test_outside_of_a_pipeline_there_is_none() -> None:
    assert Asking()() is None


def test_a_pipeline_with_another_transformer_is_passed_by() -> None:
    transformer = Asking()
    inner = Pipeline(Asking(), between=lambda _: transformer())
    assert inner() is None
    outer = Pipeline(transformer, between=lambda _: inner())
    assert outer() is outer


def test_of_a_pipeline_in_another_the_inner_one_is_found() -> None:
    transformer = Asking()
    inner = Pipeline(transformer)
    assert Pipeline(transformer, between=lambda _: inner())() is inner


def test_it_is_looked_for_behind_hooks_and_not_without_an_end() -> None:
    near = Pipeline(Asking(), between=lambda call: deeper(DEPTH // 2, call))
    assert near() is near
    assert Pipeline(Asking(), between=lambda call: deeper(DEPTH, call))() is None
