"""TensorRT and TensorRT-RTX as far as they go without a GPU: options, messages, artifacts."""

import json
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from click.testing import CliRunner
from onnx import TensorProto, helper

import recache_compile as rc
from recache_compile.cli.app import main
from recache_compile.errors import ArtifactError, DispatchError, RuntimeUnavailableError
from recache_compile.runtimes.base import is_compatible
from recache_compile.runtimes.registry import get_runtime
from recache_compile.runtimes.tensorrt import TensorRT, TensorRTForRTX
from tests.conftest import doubled_inputs

trt = pytest.importorskip("tensorrt_rtx")

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")


@pytest.fixture(scope="module")
def compiled(bundle: Path) -> rc.Compiled:
    with torch.no_grad():
        return rc.rebuild(bundle, TensorRTForRTX(targets=("sm89",)))


@pytest.fixture(scope="module")
def bundle(tensorrt_artifact: Path) -> Path:
    return tensorrt_artifact


def test_a_bundle_holds_engines_models_and_one_copy_of_the_weights(compiled: rc.Compiled, bundle: Path) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert manifest["device"] == "cuda"
    assert manifest["requirements"] == {"tensorrt_rtx": trt.__version__, "gpu": "sm89"}
    for name in compiled.variants[0].programs:
        assert (bundle / "engines" / "0" / f"{name}.engine").stat().st_size > 10_000
        onnx.checker.check_model(bundle / f"{name}.0.onnx", full_check=True)


@without_gpu
def test_without_a_gpu_it_is_refused_with_the_command_that_rebuilds_it(bundle: Path) -> None:
    message = r"are for cuda, tensorrt_rtx .*, gpu sm89, and there is no CUDA GPU here; load it where there is one, or run recache-compile rebuild .*auto --output OTHER"
    with pytest.raises(ArtifactError, match=message):
        rc.load(bundle)


@without_gpu
def test_rebuilding_without_a_gpu_keeps_the_targets(bundle: Path) -> None:
    assert rc.rebuild(bundle).engines.requirements == {"tensorrt_rtx": trt.__version__, "gpu": "sm89"}


@without_gpu
def test_the_other_device_has_another_runtime(bundle: Path) -> None:
    with pytest.raises(ArtifactError, match=r"not for cpu; run recache-compile rebuild .* --runtime auto --device cpu"):
        rc.load(bundle, device="cpu")


@without_gpu
def test_an_engine_that_cannot_run_here_says_so(compiled: rc.Compiled) -> None:
    with pytest.raises(DispatchError, match=r"run on a CUDA GPU, the model was compiled on cpu; save the artifact"):
        compiled.dispatcher(2)(step=0, **doubled_inputs())


def test_inspect_needs_no_gpu(bundle: Path) -> None:
    result = CliRunner().invoke(main, ["inspect", str(bundle), "--json"])
    facts = json.loads(result.stdout)
    assert facts["description"]["config"]["runtime"] == "tensorrt_rtx"
    assert facts["requirements"]["gpu"] == "sm89"
    page = CliRunner().invoke(main, ["inspect", str(bundle)]).stdout
    assert f"tensorrt_rtx for tensorrt_rtx {trt.__version__}, gpu sm89" in page


def test_rebuilding_keeps_schedules_and_weights(compiled: rc.Compiled, bundle: Path, tmp_path: Path) -> None:
    command = ["rebuild", str(bundle), "--target", "sm120", "--optimization-level", "1", "--workspace", "64"]
    result = CliRunner().invoke(main, [*command, "--output", str(tmp_path / "other")])
    assert result.exit_code == 0, result.output
    assert "gpu sm120" in result.stdout
    manifests = [json.loads((folder / "manifest.json").read_text()) for folder in (bundle, tmp_path / "other")]
    assert manifests[0]["plans"] == manifests[1]["plans"]
    weights = [(folder / "weights.safetensors").read_bytes() for folder in (bundle, tmp_path / "other")]
    assert weights[0] == weights[1]


def test_rebuilt_for_eager_it_runs_here(compiled: rc.Compiled, bundle: Path) -> None:
    inputs = doubled_inputs()
    result = rc.rebuild(bundle, "eager").dispatcher(2)(step=0, **inputs)
    hidden = inputs["hidden_states"]
    for number in range(2):
        weight, bias = (compiled.weights[f"layers.{number}.{kind}"] for kind in ("weight", "bias"))
        hidden = hidden + torch.nn.functional.linear(hidden, weight, bias)
    assert torch.allclose(result, hidden, atol=1e-6)


@pytest.mark.parametrize(
    ("runtime", "message"),
    [
        (TensorRTForRTX(targets=("sm35",)), r"target 'sm35' is unknown; choose among sm75, sm80, .*sm120"),
        (TensorRTForRTX(targets=("sm89", "")), "target '' is unknown"),
        (TensorRT(), "pip install tensorrt"),
    ],
    ids=str,
)
def test_options_that_make_no_sense_are_refused(runtime: Any, message: str) -> None:
    with pytest.raises(RuntimeUnavailableError, match=message):
        get_runtime(runtime)


def test_targets_are_taken_in_any_case_and_once() -> None:
    key = TensorRTForRTX(targets=("SM89", " sm89", "sm120")).build_requirements(torch.device("cpu"))
    assert key == {"tensorrt_rtx": trt.__version__, "gpu": "sm89 or sm120"}


@without_gpu
def test_a_gpu_that_the_library_does_not_build_for_is_refused_before_building(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    with pytest.raises(
        RuntimeUnavailableError, match=r"does not build for this GPU \(sm90\); it knows .*runtime tensorrt"
    ):
        TensorRTForRTX().require_on(torch.device("cuda"))
    TensorRTForRTX(targets=("sm89",)).require_on(torch.device("cuda"))


def test_without_targets_all_from_ampere_on_are_built_for() -> None:
    gpus = TensorRTForRTX().build_requirements(torch.device("cpu"))["gpu"].split(" or ")
    assert {"sm80", "sm86", "sm89", "sm120"} <= set(gpus)
    assert "sm75" not in gpus


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--runtime", "eager", "--tf32"), "--tf32: is for runtime tensorrt and tensorrt_rtx, this is eager"),
        (("--runtime", "eager", "--optimization-level", "0"), "--optimization-level: is for runtime tensorrt and"),
        (
            ("--runtime", "tensorrt-rtx", "--timing-cache", "x"),
            "--timing-cache: is for runtime tensorrt, this is tensorrt_rtx",
        ),
        (
            ("--runtime", "tensorrt-rtx", "--version-compatible"),
            "--version-compatible: is for runtime tensorrt, this is",
        ),
        (("--runtime", "tensorrt-rtx", "--target", ""), "target '' is unknown"),
        (("--runtime", "tensorrt", "--target", "sm89"), "--target: is for runtime tensorrt_rtx, this is tensorrt"),
    ],
)
def test_options_of_another_runtime_are_refused(options: tuple[str, ...], message: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["shapes", *options, "--output", str(tmp_path / "out")])
    assert result.exit_code != 0
    assert message in result.output
    assert not (tmp_path / "out").exists()


def test_an_operator_that_is_missing_is_named_by_its_module(tmp_path: Path) -> None:
    node = helper.make_node("Det", ["x"], ["y"], name="transformer_blocks.3.attn/Det_1")
    value = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in (("x", [2, 2]), ("y", []))
    ]
    graph = helper.make_graph([node], "recompute", value[:1], value[1:])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)]), tmp_path / "model.onnx")
    with pytest.raises(
        RuntimeUnavailableError, match=r"recompute cannot be built, at transformer_blocks\.3\.attn/Det_1"
    ):
        TensorRTForRTX().build(tmp_path / "model.onnx", "recompute")


def test_a_missing_library_names_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "tensorrt_rtx", None)
    with pytest.raises(RuntimeUnavailableError, match="pip install tensorrt-rtx"):
        get_runtime("tensorrt-rtx")


@pytest.mark.slow
@without_gpu
def test_the_main_command_leaves_a_bundle_where_nothing_can_be_compared(tmp_path: Path) -> None:
    command = (
        "shapes --steps 6 --budgets 2,3 --forecaster reuse --order 0 --policy gram --runtime tensorrt-rtx --target sm89"
    )
    folder = tmp_path / "bundle"
    result = CliRunner().invoke(main, [*command.split(), "--json", "--output", str(folder)])
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    assert (facts["runtime"], facts["policy"]) == ("tensorrt_rtx", "gram")  # which ran the programs themselves
    assert facts["picture"] is None
    assert [(each["budget"], each["speedup"], each["psnr"]) for each in facts["budgets"]] == [
        (2, None, None),
        (3, None, None),
    ]
    assert {file.suffix for file in folder.iterdir()} == {"", ".onnx", ".json", ".safetensors"}
    parameters = (folder / "weights.safetensors").stat().st_size
    assert sum(file.stat().st_size for file in folder.glob("*.onnx")) < 0.1 * parameters


@pytest.mark.parametrize(
    ("wanted", "found", "fit"),
    [
        ("sm89", "sm89", True),
        ("sm89", "sm90", False),
        ("sm89 or sm120", "sm120", True),
        ("sm80+", "sm120", True),
        ("sm80+", "sm75", False),
        ("sm80+", "none", False),
        ("1.7.1.116", "1.7.2.1", False),
        ("1.7.1.116+", "1.10.0.3", True),
        ("1.7.1.116+", "1.7.0.9", False),
        ("avx2 and fma", "avx and avx2 and fma", True),
        ("avx2 and avx512f", "avx and avx2 and fma", False),
    ],
)
def test_engines_fit_what_their_key_names(wanted: str, found: str, fit: bool) -> None:
    assert is_compatible({"what": wanted}, {"what": found}) is fit


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_engines_give_what_eager_gives(bundle: Path, cuda_graphs: bool) -> None:
    rebuilt, eager = rc.rebuild(bundle, device="cuda"), rc.rebuild(bundle, "eager", "cuda")
    rebuilt.save(bundle.with_name("here"))
    runs = rc.load(bundle.with_name("here"), cuda_graphs=cuda_graphs).dispatcher(2), eager.dispatcher(2)
    for _ in range(2):
        for step in range(4):
            inputs = {"hidden_states": torch.randn(2, 4).cuda(), "timestep": torch.full((1,), 1.0 - 0.2 * step).cuda()}
            ours, theirs = (run(step=step, **inputs) for run in runs)
            assert torch.allclose(ours, theirs, atol=1e-4)
