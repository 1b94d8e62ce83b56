"""Models described by data."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from recache_compile.artifact.specs import find_spec_file, known_specs, read_spec
from recache_compile.errors import ModelError

SPEC: dict[str, Any] = {
    "name": "tiny",
    "num_steps": 4,
    "class": "DiTTransformer2DModel",
    "config": {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2, "sample_size": 8, "patch_size": 2},
    "inputs": {
        "hidden_states": {"shape": [1, 4, 8, 8], "dtype": "bfloat16"},
        "timestep": {"shape": [1], "dtype": "int64"},
        "class_labels": {"shape": [1], "dtype": "int64"},
        "cross_attention_kwargs": {"value": None},
    },
}

PUBLISHED = {
    "flux.1-dev": 11.9e9,
    "hunyuanvideo": 12.8e9,
    "pixart-sigma": 0.61e9,
    "qwen-image": 20.4e9,
    "sd3.5-large": 8.06e9,
    "wan2.1-1.3b": 1.42e9,
    "wan2.1-14b": 14.3e9,
}


def written(folder: Path, **changes: Any) -> Path:
    file = folder / "spec.json"
    file.write_text(json.dumps(SPEC | changes), encoding="utf-8")
    return file


def test_a_spec_becomes_a_module_and_a_call_without_memory(tmp_path: Path) -> None:
    abstract = read_spec(written(tmp_path))
    assert {parameter.device.type for parameter in abstract.module.parameters()} == {"meta"}
    assert {parameter.dtype for parameter in abstract.module.parameters()} == {torch.bfloat16}
    assert abstract.example.inputs["hidden_states"].shape == (1, 4, 8, 8)
    assert abstract.example.inputs["cross_attention_kwargs"] is None
    assert abstract.module(**abstract.example.inputs, return_dict=False)[0].device.type == "meta"


def test_inputs_may_be_nested(tmp_path: Path) -> None:
    entry = {"shape": [2, 3], "dtype": "float32"}
    nested = {"x": [entry, entry], "y": {"scale": {"value": 0.5}, "mask": entry}}
    inputs = read_spec(written(tmp_path, inputs=nested)).example.inputs
    assert [each.shape for each in inputs["x"]] == [(2, 3), (2, 3)]
    assert inputs["y"]["scale"] == 0.5
    assert inputs["y"]["mask"].shape == (2, 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"class": "NoSuchModel"}, "has no model class 'NoSuchModel'"),
        ({"class": "DDIMScheduler"}, "has no model class"),
        ({"config": {"depth": 3}}, "does not take this config"),
        ({"dtype": "float31"}, "'float31' is no dtype"),
        ({"num_steps": 0}, "at num_steps"),
        ({"inputs": {"hidden_states": 3}}, "expected an object with a shape or a value"),
        ({"extra": 1}, "at extra"),
    ],
)
def test_a_spec_that_makes_no_sense_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=message):
        read_spec(written(tmp_path, **changes))


def test_a_file_that_is_no_spec_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "broken.json"
    file.write_text("{", encoding="utf-8")
    with pytest.raises(ModelError, match=r"broken\.json"):
        read_spec(file)
    with pytest.raises(ModelError, match="cannot be read"):
        read_spec(tmp_path / "absent.json")


def test_the_specs_of_the_package_have_the_published_sizes() -> None:
    assert set(known_specs()) == set(PUBLISHED)
    for name, size in PUBLISHED.items():
        file = find_spec_file(name.upper())
        assert file is not None
        parameters = sum(parameter.numel() for parameter in read_spec(file).module.parameters())
        assert parameters == pytest.approx(size, rel=0.005)


def test_other_names_are_no_specs() -> None:
    assert find_spec_file("shapes") is None
    assert find_spec_file("organisation/model") is None
