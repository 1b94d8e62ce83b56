"""What needs a CUDA device: the same results there as on the CPU, and no wait in the loop."""

from collections.abc import Iterator

import pytest
import torch

import recache_compile as rc
from recache_compile.errors import DispatchError
from recache_compile.runtimes.tensorrt import capability
from tests.compiler.test_build import relative_error
from tests.conftest import NUM_STEPS, flux_inputs, loop_inputs, timesteps, tiny_flux

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(scope="module", autouse=True)
def _exact_products() -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def on_gpu(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.cuda() for name, value in inputs.items()}


@pytest.fixture(
    scope="module",
    params=[(name, graphs) for name in ("eager", "inductor", "tensorrt_rtx") for graphs in (False, True)],
    ids=lambda param: param[0] + "+graphs" * param[1],
)
def compiled(request: pytest.FixtureRequest) -> rc.Compiled:
    name, cuda_graphs = request.param
    if name == "tensorrt_rtx":
        known = pytest.importorskip(name).ComputeCapability.__members__
        if (here := capability(torch.device("cuda")).upper()) not in known:
            pytest.skip(f"TensorRT for RTX does not build for {here}")
    with torch.no_grad():
        return rc.compile(
            tiny_flux().cuda(), on_gpu(flux_inputs()), budgets=(3, NUM_STEPS), num_steps=NUM_STEPS,
            runtime=name, timesteps={"timestep": timesteps().cuda()}, cuda_graphs=cuda_graphs,
        )  # fmt: skip


@pytest.mark.parametrize("budget", [3, NUM_STEPS])
def test_results_equal_those_of_the_cpu(budget: int, compiled: rc.Compiled, eager: rc.Compiled) -> None:
    ours, reference = compiled.dispatcher(budget=budget), eager.dispatcher(budget=budget)
    for step in range(NUM_STEPS):
        inputs = loop_inputs(step, flux_inputs())
        result = ours(step=step, **on_gpu(inputs))[0].cpu()
        assert relative_error(result, reference(step=step, **inputs)[0]) <= 1e-4


def test_the_loop_never_waits_for_the_device(compiled: rc.Compiled) -> None:
    run, inputs = compiled.dispatcher(budget=3), on_gpu(flux_inputs())
    table = timesteps().cuda()
    for mode in ("default", "error"):  # the first generation may wait: it loads kernels
        run.reset()
        torch.cuda.set_sync_debug_mode("default")
        run(step=0, **inputs)
        torch.cuda.set_sync_debug_mode(mode)
        try:
            for step in range(1, NUM_STEPS - 1):
                run(step=step, **{**inputs, "timestep": table[step]})
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_other_timesteps_are_reported_after_the_last_step(compiled: rc.Compiled) -> None:
    run = compiled.dispatcher(budget=3)

    def generation() -> None:
        for step in range(NUM_STEPS):
            inputs = on_gpu(loop_inputs(step, flux_inputs()))
            run(step=step, **{**inputs, "timestep": inputs["timestep"] * 0.5})

    with pytest.raises(DispatchError, match="timesteps of this generation are not those"):
        generation()
    generation()


def test_an_artifact_loads_on_the_gpu(compiled: rc.Compiled, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("gpu") / "artifact"
    compiled.save(folder)
    loaded = rc.load(folder)
    assert loaded.variants[0].device.type == "cuda"
    runs = compiled.dispatcher(budget=3), loaded.dispatcher(budget=3)
    for step in range(NUM_STEPS):
        one, two = (run(step=step, **on_gpu(loop_inputs(step, flux_inputs())))[0] for run in runs)
        assert torch.equal(one, two)
