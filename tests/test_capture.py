"""Capture: roles, names, constants and clear errors."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from recache_compile.capture import capture
from recache_compile.errors import CaptureError
from recache_compile.export import named_leaves
from recache_compile.program import Kind, Role
from tests.conftest import flux_inputs


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.tied = self.linear

    def forward(
        self, sample: Tensor, t: Tensor, extra: dict[str, Any], scale: float = 1.0, return_dict: bool = True
    ) -> Any:
        result = self.tied(self.linear(sample)) * scale + t[:, None] + extra["bias"][0]
        return {"sample": result} if return_dict else (result, sample + 1)


def inputs() -> dict[str, Any]:
    return {"sample": torch.randn(2, 4), "t": torch.ones(2), "extra": {"bias": [torch.ones(4)]}, "scale": 2.0}


def test_roles_are_inferred_from_names(flux: nn.Module) -> None:
    _, signature = capture(flux, flux_inputs())
    assert signature.names(Role.LATENTS) == ("hidden_states",)
    assert signature.names(Role.TIMESTEP) == ("timestep",)
    assert set(signature.names(Role.CONDITIONING)) == set(flux_inputs()) - {"hidden_states", "timestep"}


def test_roles_can_be_overridden() -> None:
    _, signature = capture(Model(), inputs(), roles={"extra.bias.0": "latents"})
    assert signature.names(Role.LATENTS) == ("sample", "extra.bias.0")


def test_nested_inputs_have_dotted_names_and_constants_are_kept() -> None:
    program, signature = capture(Model(), inputs())
    assert [value.name for value in program.inputs] == ["sample", "t", "extra.bias.0"]
    assert dict(signature.constants) == {"scale": "2.0"}


def test_the_program_computes_what_the_module_computes() -> None:
    model, given = Model(), inputs()
    program, _ = capture(model, given)
    leaves = named_leaves(given)
    results = program.module(*[leaves[value.name] for value in program.inputs])
    assert all(map(torch.equal, results, model(**given, return_dict=False)))
    assert [value.kind for value in program.outputs] == [Kind.PREDICTION] * 2


def test_a_tied_weight_has_one_name() -> None:
    program, _ = capture(Model(), inputs())
    assert set(program.weights) == {"linear.weight", "linear.bias"}


def test_training_mode_is_restored_and_not_captured() -> None:
    model = nn.Sequential(nn.Dropout(0.5)).train()
    program, _ = capture(model, {"input": torch.ones(8)}, roles={"input": "latents"})
    assert model.training
    assert torch.equal(program.module(torch.ones(8))[0], torch.ones(8))


class DataDependent(nn.Module):
    def forward(self, sample: Tensor) -> Tensor:
        return sample if sample.sum() > 0 else -sample


class NoTensor(nn.Module):
    def forward(self, sample: Tensor) -> tuple[Tensor, int]:
        return sample + 1, 3


@pytest.mark.parametrize(
    ("model", "given", "message"),
    [
        (Model(), inputs() | {"sampel": 1}, r"has no input \['sampel'\]"),
        (DataDependent(), {"sample": torch.ones(3)}, "capture of DataDependent: torch.export failed"),
        (NoTensor(), {"sample": torch.ones(3)}, "result 1 is no tensor"),
        (nn.Identity(), {"input": torch.ones(3)}, "no latents among input"),
    ],
)
def test_what_cannot_be_captured_is_refused(model: nn.Module, given: dict[str, Any], message: str) -> None:
    with pytest.raises(CaptureError, match=message):
        capture(model, given)
