"""What is left out means the same on the command line and in Python."""

import inspect
from collections.abc import Callable
from typing import Any

import pytest

import recache_compile as rc
from recache_compile.cli.app import main

COMMON = {"num_steps", "budgets", "forecaster", "order", "policy", "granularity", "residual", "hoist", "call"}


@pytest.mark.parametrize(
    ("name", "function", "shared"),
    [("compile", rc.compile, {*COMMON, "runtime", "component", "cuda_graphs"}), ("plan", rc.plan, COMMON)],
)
def test_defaults_are_those_of_python(name: str, function: Callable[..., Any], shared: set[str]) -> None:
    options = main.commands[name].make_context(name, ["shapes"]).params
    given = {"num_steps": options.pop("steps"), **options}
    parameters = inspect.signature(function).parameters
    assert shared <= given.keys() & parameters.keys()
    assert {key: given[key] or None for key in shared} == {key: parameters[key].default or None for key in shared}
