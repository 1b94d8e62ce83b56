"""Shared models and compilations: each is made once for the whole session."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from diffusers import FluxTransformer2DModel
from torch._inductor import config as inductor

import recache_compile as rc
from recache_compile.pipelines.load import load_pipeline

_CACHE = tempfile.TemporaryDirectory(prefix="recache-tests-")
os.environ["RECACHE_CACHE"] = _CACHE.name  # tests never write to the user's cache
# What calls the kernels is most of what g++ reads: here and in the processes that tests start.
inductor.aot_inductor.compile_wrapper_opt_level = "O0"
os.environ["AOT_INDUCTOR_COMPILE_WRAPPER_OPT_LEVEL"] = "O0"

NUM_STEPS = 12
RUNTIMES = ["eager", *(pytest.param(name, marks=pytest.mark.slow) for name in ("inductor", "onnxruntime"))]
PROMPT = "a red circle left of a blue square on a dark background"
TRAINING = (
    *("train", "shapes", "--steps", "8", "--budgets", "3,4", "--samples", "4", "--held-out", "4", "--batch", "2"),
    *("--runtime", "eager", "--effort", "0.1"),
)
"""A training that takes seconds; `--out` is missing."""

EVALUATION = (
    *("evaluate", "shapes", "--steps", "8", "--budgets", "2,4", "--samples", "8", "--batch", "4"),
    *("--policy", "uniform", "--policy", "front-loaded", "--runtime", "eager", "--repeats", "1"),
)
"""An evaluation that takes seconds; `--out` is missing."""

TOGETHER = (
    ("test_build", "test_store", "test_compiled", "test_bundle", "test_onnx_program"),
    ("test_session", "test_report"),
    ("test_real_pipelines", "test_real_schedulers"),
)
"""Files that share what takes long to make: one process of pytest-xdist runs them."""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """File by file, those that belong together as one."""
    from xdist.scheduler import LoadFileScheduling

    groups = {name: names[0] for names in TOGETHER for name in names}

    class Together(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return groups.get(Path(file).stem, file)

    return Together(config, log)


def tiny_flux(seed: int = 0) -> FluxTransformer2DModel:
    """Two double and three single blocks of width 32."""
    torch.manual_seed(seed)
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=8,
        num_layers=2,
        num_single_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=20,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    ).eval()


def flux_inputs(seed: int = 0, batch: int = 1) -> dict[str, torch.Tensor]:
    """Arguments of one call of `tiny_flux`."""
    generator = torch.Generator().manual_seed(seed)
    side = torch.arange(4.0)
    rows, columns = torch.meshgrid(side, side, indexing="ij")
    return {
        "hidden_states": torch.randn(batch, 16, 8, generator=generator),
        "encoder_hidden_states": torch.randn(batch, 6, 24, generator=generator),
        "pooled_projections": torch.randn(batch, 20, generator=generator),
        "timestep": torch.full((batch,), 1.0),
        "img_ids": torch.stack([torch.zeros_like(rows), rows, columns], -1).reshape(-1, 3),
        "txt_ids": torch.zeros(6, 3),
        "guidance": torch.full((batch,), 3.5),
    }


class Doubled(torch.nn.Module):
    """Two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(2))

    def forward(self, hidden_states: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            hidden_states = hidden_states + layer(hidden_states) * timestep
        return hidden_states


def doubled_inputs() -> dict[str, torch.Tensor]:
    """Arguments of one call of `Doubled`."""
    return {"hidden_states": torch.randn(2, 4), "timestep": torch.ones(1)}


def timesteps(batch: int = 1, num_steps: int = NUM_STEPS) -> torch.Tensor:
    """A shifted flow-matching timetable (num_steps, batch)."""
    sigma = torch.linspace(1, 1 / num_steps, num_steps)
    return (3 * sigma / (1 + 2 * sigma))[:, None].expand(-1, batch).contiguous()


def loop_inputs(step: int, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The arguments of one step: new latents, this step's timestep, the same conditioning."""
    generator = torch.Generator().manual_seed(1000 + step)
    batch = len(inputs["timestep"])
    latents = inputs["hidden_states"] + 0.3 * torch.randn(inputs["hidden_states"].shape, generator=generator)
    return {**inputs, "hidden_states": latents, "timestep": timesteps(batch)[step]}


def compile_flux(module: torch.nn.Module, **options: Any) -> rc.Compiled:
    """Compile `tiny_flux` with the defaults of these tests."""
    options = {"budgets": (3, NUM_STEPS), "num_steps": NUM_STEPS, "runtime": "eager"} | options
    return rc.compile(module, flux_inputs(), timesteps={"timestep": timesteps()}, **options)


@pytest.fixture(autouse=True, scope="session")
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What `accelerate` keeps on disk goes to a temporary folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RECACHE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(scope="session")
def flux() -> FluxTransformer2DModel:
    return tiny_flux()


@pytest.fixture(scope="session")
def eager(flux: FluxTransformer2DModel) -> rc.Compiled:
    return compile_flux(flux)


@pytest.fixture(scope="session")
def inductor(flux: FluxTransformer2DModel) -> rc.Compiled:
    return compile_flux(flux, runtime="inductor")


@pytest.fixture(scope="session")
def onnxruntime(flux: FluxTransformer2DModel) -> rc.Compiled:
    pytest.importorskip("onnxruntime")
    return compile_flux(flux, runtime="onnxruntime")


@pytest.fixture(scope="session")
def shapes() -> Any:
    return load_pipeline("shapes")


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a trained policy, and of its study; do not write to it."""
    from recache_compile.cli.app import main

    folder = tmp_path_factory.mktemp("trained") / "policy"
    result = CliRunner().invoke(main, [*TRAINING, "--out", str(folder)])
    assert result.exit_code == 0, result.output
    return folder


@pytest.fixture(scope="session")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an evaluation; do not write to it."""
    from recache_compile.cli.app import main

    folder = tmp_path_factory.mktemp("evaluated") / "evaluation"
    result = CliRunner().invoke(main, [*EVALUATION, "--out", str(folder)])
    assert result.exit_code == 0, result.output
    return folder


@pytest.fixture(scope="session")
def eager_artifact(eager: rc.Compiled, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("artifacts") / "eager"
    eager.save(folder)
    return folder


@pytest.fixture(scope="session")
def inductor_artifact(inductor: rc.Compiled, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("artifacts") / "inductor"
    inductor.save(folder)
    return folder


@pytest.fixture(scope="session")
def tensorrt_artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A very small model's."""
    pytest.importorskip("tensorrt_rtx")
    from recache_compile.runtimes.tensorrt import TensorRTForRTX

    folder = tmp_path_factory.mktemp("artifacts") / "tensorrt"
    runtime = TensorRTForRTX(targets=("sm89",))
    with torch.no_grad():
        rc.compile(Doubled(), doubled_inputs(), budgets=(2,), num_steps=4, forecaster="reuse", runtime=runtime).save(
            folder
        )
    return folder


@pytest.fixture(scope="session")
def onnxruntime_artifact(onnxruntime: rc.Compiled, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("artifacts") / "onnxruntime"
    onnxruntime.save(folder)
    return folder
