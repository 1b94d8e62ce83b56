"""Guidance branches that a pipeline does not name are known by their conditioning."""

import pytest
import torch
from torch import Tensor

from recache_compile.pipelines import branches as module
from recache_compile.pipelines.branches import Branches
from recache_compile.runtimes import _tensor_snapshot

CHANGING = {"hidden_states", "timestep"}


def call(prompt: Tensor, step: int = 0) -> dict[str, Tensor]:
    return {"hidden_states": torch.randn(1, 2), "timestep": torch.tensor([float(step)]), "prompt": prompt}


def test_two_calls_a_step_are_two_branches_in_any_order() -> None:
    branches, cond, uncond = Branches(), torch.ones(2), torch.zeros(2)
    names = [branches.find(step, call(prompt, step), CHANGING) for step in (0, 1) for prompt in (cond, uncond)]
    assert names == ["0", "1", "0", "1"]
    assert branches.find(2, call(uncond), CHANGING) == "1"
    assert branches.find(2, call(cond), CHANGING) == "0"


def test_a_branch_that_begins_late_does_not_take_the_place_of_the_first() -> None:
    branches, cond, uncond = Branches(), torch.ones(2), torch.zeros(2)
    assert branches.find(0, call(cond), CHANGING) == "0"
    assert branches.find(1, call(uncond), CHANGING) == "1"
    assert branches.find(1, call(cond), CHANGING) == "0"


def test_equal_values_in_other_tensors_are_the_same_branch() -> None:
    branches = Branches()
    assert branches.find(0, call(torch.ones(2)), CHANGING) == "0"
    assert branches.find(1, call(torch.ones(2)), CHANGING) == "0"


def test_a_tensor_that_was_written_to_is_the_same_branch() -> None:
    branches, prompt = Branches(), torch.ones(2)
    assert branches.find(0, call(prompt), CHANGING) == "0"
    prompt.mul_(3)
    assert branches.find(1, call(prompt), CHANGING) == "0"
    assert branches.find(2, call(torch.full((2,), 3.0)), CHANGING) == "0"


def test_other_shapes_are_other_branches() -> None:
    branches = Branches()
    assert branches.find(0, call(torch.ones(2)), CHANGING) == "0"
    assert branches.find(0, call(torch.ones(3)), CHANGING) == "1"


def test_on_a_gpu_the_very_same_tensors_are_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    for each in (module, _tensor_snapshot):
        monkeypatch.setattr(each, "host_waits", lambda tensor: True)
    with torch.inference_mode():
        branches, cond, uncond = Branches(), torch.ones(2), torch.zeros(2)
        for prompt in (cond, uncond):
            branches.find(0, call(prompt), CHANGING)
        monkeypatch.setattr(torch, "equal", None)
        assert [branches.find(1, call(prompt), CHANGING) for prompt in (cond, uncond)] == ["0", "1"]
