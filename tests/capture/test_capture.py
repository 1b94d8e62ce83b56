"""Capture: roles, names, constants and clear errors."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from recache_compile.capture.capture import Captured, capture
from recache_compile.errors import CaptureError
from recache_compile.ir.signature import named_leaves
from recache_compile.ir.value import Kind
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


def roles_of(captured: Captured) -> dict[str, Kind]:
    return {value.name: value.kind for value in captured.program.inputs}


def test_roles_are_inferred_from_names(flux: nn.Module) -> None:
    roles = roles_of(capture(flux, flux_inputs()))
    assert roles.pop("hidden_states") == Kind.LATENTS
    assert roles.pop("timestep") == Kind.TIMESTEP
    assert set(roles) == set(flux_inputs()) - {"hidden_states", "timestep"}
    assert set(roles.values()) == {Kind.CONDITIONING}


def test_roles_can_be_overridden() -> None:
    roles = roles_of(capture(Model(), inputs(), roles={"extra.bias.0": "latents"}))
    assert roles == {"sample": Kind.LATENTS, "t": Kind.TIMESTEP, "extra.bias.0": Kind.LATENTS}


def test_nested_inputs_have_dotted_names_and_constants_are_kept() -> None:
    captured = capture(Model(), inputs())
    assert [value.name for value in captured.program.inputs] == ["sample", "t", "extra.bias.0"]
    assert dict(captured.constants) == {"scale": "2.0"}
    assert captured.fixed == {}


def test_a_constant_that_is_left_out_is_kept_with_its_default() -> None:
    given = inputs()
    del given["scale"]
    captured = capture(Model(), given)
    assert dict(captured.constants) == {"scale": "1.0"}
    assert captured.signature.parameters == ("sample", "t", "extra", "scale", "return_dict")
    assert captured.signature.defaults == (("scale", "1.0"), ("return_dict", "True"))
    assert captured.signature.constants(given, named_leaves(given)) == {"scale": "1.0"}


def test_an_empty_container_is_not_the_default() -> None:
    signature = capture(Model(), inputs()).signature
    given = inputs() | {"scale": []}
    assert signature.constants(given, named_leaves(given))["scale"] == "[]"


def test_signatures_of_other_shapes_and_constants_are_equal() -> None:
    other = inputs() | {"sample": torch.randn(3, 4), "t": torch.ones(3), "scale": 1.5}
    assert capture(Model(), inputs()).signature == capture(Model(), other).signature


def test_the_program_computes_what_the_module_computes() -> None:
    model, given = Model(), inputs()
    program = capture(model, given).program
    leaves = named_leaves(given)
    results = program.module(*[leaves[value.name] for value in program.inputs])
    assert all(map(torch.equal, results, model(**given, return_dict=False)))
    assert [value.kind for value in program.outputs] == [Kind.PREDICTION] * 2


def test_a_tied_weight_has_one_name() -> None:
    assert set(capture(Model(), inputs()).program.weights) == {"linear.weight", "linear.bias"}


def test_training_mode_is_restored_and_not_captured() -> None:
    model = nn.Sequential(nn.Dropout(0.5)).train()
    program = capture(model, {"input": torch.ones(8)}, roles={"input": "latents"}).program
    assert model.training
    assert torch.equal(program.module(torch.ones(8))[0], torch.ones(8))


class Selective(nn.Module):
    """Reads the values of its mask, and has a result that may be None."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(4, 4)])

    def forward(self, sample: Tensor, mask: Tensor, extra: Tensor | None = None) -> Any:
        kept = self.blocks[0](sample)[:, : int(mask.sum())]
        return kept, None if extra is None else kept + extra, {"mean": kept.mean()}


def test_inputs_that_the_code_reads_are_fixed_with_their_values() -> None:
    mask = torch.tensor([True, True, False])
    captured = capture(Selective(), {"sample": torch.ones(1, 3, 4), "mask": mask})
    assert list(captured.fixed) == ["mask"]
    assert torch.equal(captured.fixed["mask"], mask)
    assert captured.fixed["mask"].data_ptr() != mask.data_ptr()
    assert list(roles_of(captured)) == ["sample"]
    assert dict(captured.constants) == {"extra": "None"}


def test_a_result_may_be_none() -> None:
    model, given = Selective(), {"sample": torch.randn(1, 3, 4), "mask": torch.tensor([True, True, False])}
    captured = capture(model, given)
    assert captured.signature.tensors == (True, False, True)
    assert [value.name for value in captured.program.outputs] == ["prediction_0", "prediction_1"]
    results = captured.program.module(given["sample"])
    assert all(map(torch.equal, results, (model(**given)[0], model(**given)[2]["mean"])))


def test_module_lists_are_the_containers() -> None:
    given = {"sample": torch.ones(1, 3, 4), "mask": torch.ones(3)}
    assert capture(Selective(), given).containers == ("blocks",)


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
        (NoTensor(), {"sample": torch.ones(3)}, "result 1 is neither a tensor nor None, but 3"),
        (nn.Identity(), {"input": torch.ones(3)}, "no latents among input"),
        (
            nn.Identity(),
            {"input": {"x": torch.ones(3), "f": lambda x: x}},
            r"its input input\.f is a function, which no",
        ),
    ],
)
def test_what_cannot_be_captured_is_refused(model: nn.Module, given: dict[str, Any], message: str) -> None:
    with pytest.raises(CaptureError, match=message):
        capture(model, given)
