"""One generation on every runtime, and every program as a TensorRT-RTX engine, for four models."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch

import recache_compile as rc
from recache_compile.ir.value import Kind
from recache_compile.pipelines.load import load_pipeline
from recache_compile.pipelines.record import prompted, record_examples
from recache_compile.runtimes.tensorrt import TensorRTForRTX, profile_of
from tests.conftest import PROMPT
from tests.zoo.base import Draw
from tests.zoo.check import distance, step_inputs
from tests.zoo.table import all_cases

NUM_STEPS, BUDGET = 6, 3
TOLERANCE = 1e-4
MODELS = ("shapes", "FluxTransformer2DModel", "SD3Transformer2DModel", "WanTransformer3DModel")
TYPES = {
    torch.float32: "FLOAT",
    torch.bfloat16: "BF16",
    torch.float16: "HALF",
    torch.int64: "INT64",
    torch.int32: "INT32",
    torch.bool: "BOOL",
}

pytestmark = pytest.mark.slow


@dataclass(frozen=True, slots=True)
class Made:
    """A model compiled for the eager runtime, saved, and what it gives."""

    folder: Path
    steps: list[Mapping[str, Any]]
    expected: list[Any]


def example(name: str) -> tuple[torch.nn.Module, dict[str, Any], Mapping[str, Any]]:
    """A model, the arguments of one call, and roles."""
    if name == "shapes":
        pipeline = load_pipeline("shapes")
        (first, *_) = record_examples(pipeline, NUM_STEPS, prompted(pipeline, PROMPT, {}))
        inputs = dict(first.inputs)
        for latents in (key for key, role in first.roles.items() if role is Kind.LATENTS):
            inputs[latents] = torch.randn_like(inputs[latents])
        return pipeline.transformer, inputs, first.roles
    case = all_cases()[name]
    return case.build(), case.inputs(Draw(0)), case.roles


def generation(compiled: rc.Compiled, steps: list[Mapping[str, Any]]) -> list[Any]:
    run = compiled.dispatcher(BUDGET)
    return [run(step=number, **inputs) for number, inputs in enumerate(steps)]


@pytest.fixture(scope="module", params=MODELS)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    with torch.no_grad():
        module, inputs, roles = example(request.param)
        compiled = rc.compile(module, inputs, budgets=(BUDGET,), num_steps=NUM_STEPS, runtime="eager", roles=roles)
        steps = [step_inputs(compiled, inputs, step) for step in range(NUM_STEPS)]
        folder = tmp_path_factory.mktemp(request.param) / "eager"
        compiled.save(folder)
        return Made(folder, steps, generation(compiled, steps))


@pytest.fixture(scope="module")
def onnx_bundle(made: Made) -> Path:
    with torch.no_grad():
        folder = made.folder.with_name("onnxruntime")
        rc.rebuild(made.folder, "onnxruntime").save(folder)
        return folder


def test_onnxruntime_gives_the_same_generation(made: Made, onnx_bundle: Path) -> None:
    results = generation(rc.load(onnx_bundle), made.steps)
    assert max(map(distance, results, made.expected)) <= TOLERANCE


@pytest.mark.parametrize(
    "made",
    ["shapes", "WanTransformer3DModel", pytest.param("SD3Transformer2DModel", marks=pytest.mark.zoo)],
    indirect=True,
)
def test_inductor_gives_the_same_generation(made: Made) -> None:
    """Flux is compared with the model itself in tests/compiler/test_build.py."""
    results = generation(rc.rebuild(made.folder, "inductor"), made.steps)
    assert max(map(distance, results, made.expected)) <= TOLERANCE


def test_every_program_is_built_with_tensorrt_rtx(onnx_bundle: Path) -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    runtime = TensorRTForRTX(targets=("sm89", "sm120"))
    for name, program in rc.load(onnx_bundle).variants[0].programs.items():
        model = onnx_bundle / f"{name}.0.onnx"
        onnx.checker.check_model(model, full_check=True)
        with runtime.logging() as logger:
            network = runtime.parse(trt.Builder(logger), model, name, logger)
        facts = [
            (tensor.name, tuple(tensor.shape), tensor.dtype.name)
            for get, count in ((network.get_input, network.num_inputs), (network.get_output, network.num_outputs))
            for tensor in map(get, range(count))
        ]
        weights = {key: (tuple(weight.shape), weight.dtype) for key, weight in program.weights.items()}
        values = {
            value.name: (tuple(-1 if size is None else size for size in value.shape), value.dtype)
            for value in (*program.inputs, *program.outputs)
        }
        assert set(facts) == {(key, shape, TYPES[dtype]) for key, (shape, dtype) in (weights | values).items()}
        assert len(runtime.build(model, name, profile_of(program))) > 10_000


def test_weights_are_the_same_file_for_every_runtime(made: Made, onnx_bundle: Path) -> None:
    ours, theirs = ((folder / "weights.safetensors").read_bytes() for folder in (made.folder, onnx_bundle))
    assert ours == theirs
