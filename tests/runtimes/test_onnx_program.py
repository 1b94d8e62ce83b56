"""Programs as ONNX models: what other tools see, and what one artifact of them weighs."""

import json
import re
from pathlib import Path

import pytest
import torch

import recache_compile as rc
from recache_compile.errors import RuntimeUnavailableError
from recache_compile.runtimes.registry import get_runtime
from tests.compiler.test_build import relative_error
from tests.conftest import compile_flux, flux_inputs, loop_inputs, tiny_flux

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")

pytestmark = pytest.mark.slow


def models(folder: Path) -> dict[str, "onnx.ModelProto"]:
    return {file.name.partition(".")[0]: onnx.load(file, load_external_data=False) for file in folder.glob("*.onnx")}


def test_every_model_passes_the_checker_where_it_lies(onnxruntime_artifact: Path) -> None:
    files = sorted(onnxruntime_artifact.glob("*.onnx"))
    assert [file.name for file in files] == [f"{name}.0.onnx" for name in ("forecast", "prologue", "recompute")]
    for file in files:
        onnx.checker.check_model(file, full_check=True)


def test_inputs_outputs_and_weights_have_the_names_of_the_model(
    onnxruntime: rc.Compiled, onnxruntime_artifact: Path
) -> None:
    for name, model in models(onnxruntime_artifact).items():
        program = onnxruntime.variants[0].programs[name]
        assert [value.name for value in model.graph.input] == [value.name for value in program.inputs]
        assert [value.name for value in model.graph.output] == [value.name for value in program.outputs]
        outside = {
            tensor.name for tensor in model.graph.initializer if tensor.data_location == onnx.TensorProto.EXTERNAL
        }
        assert outside == set(program.weights)


def test_nodes_tell_their_module(onnxruntime_artifact: Path) -> None:
    names = [node.name for node in models(onnxruntime_artifact)["recompute"].graph.node]
    assert len(set(names)) == len(names)
    assert "single_transformer_blocks.2.attn/Softmax_1" in names


def test_weights_are_stored_once_beside_all_models(onnxruntime: rc.Compiled, onnxruntime_artifact: Path) -> None:
    inside = sum(
        len(tensor.raw_data) for model in models(onnxruntime_artifact).values() for tensor in model.graph.initializer
    )
    assert inside < 0.02 * sum(weight.nbytes for weight in onnxruntime.weights.values())


def test_a_model_runs_without_this_package(onnxruntime: rc.Compiled, onnxruntime_artifact: Path) -> None:
    session = ort.InferenceSession(onnxruntime_artifact / "forecast.0.onnx")
    variant = onnxruntime.variants[0]
    inputs = [torch.randn([size or 3 for size in value.shape]) for value in variant.programs["forecast"].inputs]
    given = {
        value.name: tensor.numpy() for value, tensor in zip(variant.programs["forecast"].inputs, inputs, strict=True)
    }
    (theirs,) = session.run(None, given)
    (ours,) = variant.engines["forecast"](inputs)
    assert relative_error(ours, torch.from_numpy(theirs)) <= 1e-6


def test_no_model_tells_where_it_was_made(onnxruntime_artifact: Path) -> None:
    for file in onnxruntime_artifact.glob("*.onnx"):
        assert not re.search(rb"/site-packages|recache_compile|\.py\b", file.read_bytes())


def test_new_weights_are_seen_at_once(onnxruntime_artifact: Path) -> None:
    compiled, other = rc.load(onnxruntime_artifact), tiny_flux(1)
    run = compiled.dispatcher(budget=3)
    run(step=0, **loop_inputs(0, flux_inputs()))
    compiled.refit(other.state_dict())
    expected = compile_flux(other).dispatcher(budget=3)
    for step in range(3):
        inputs = loop_inputs(step, flux_inputs())
        assert relative_error(run(step=step, **inputs)[0], expected(step=step, **inputs)[0]) <= 1e-4


def test_an_artifact_is_not_bound_to_this_machine(onnxruntime_artifact: Path) -> None:
    assert json.loads((onnxruntime_artifact / "manifest.json").read_text())["requirements"] == {}


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_names_the_extra(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, package, None)
    with pytest.raises(RuntimeUnavailableError, match=r"pip install 'recache-compile\[onnx\]'"):
        get_runtime("onnxruntime")
