from pathlib import Path
from subprocess import CalledProcessError

import pytest
import torch
from torch import Tensor, nn

import recache_compile as rc
from recache_compile.errors import RuntimeUnavailableError
from recache_compile.runtimes import inductor
from recache_compile.runtimes.inductor import Inductor, first_complaint
from recache_compile.runtimes.registry import get_runtime
from tests.compiler.test_build import relative_error
from tests.conftest import NUM_STEPS, flux_inputs, loop_inputs, timesteps

pytestmark = pytest.mark.slow


class Small(nn.Module):
    """Weights of all small sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 8)
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.shift = nn.Parameter(torch.randn(1))
        self.register_buffer("table", torch.randn(8))
        self.wide = nn.Parameter(torch.randn(9))

    def forward(self, sample: Tensor) -> Tensor:
        return self.linear(sample) * self.scale + self.shift + self.table + self.wide[:8]


@pytest.fixture(scope="module")
def compiled() -> rc.Compiled:
    with torch.no_grad():
        return rc.compile(
            Small(),
            {"sample": torch.ones(2, 16)},
            budgets=(2,),
            num_steps=4,
            granularity="output",
            runtime="inductor",
            hoist=False,
        )


@pytest.mark.parametrize("saved", [False, True])
def test_every_weight_is_read_where_it_lies_however_small(saved: bool, compiled: rc.Compiled, tmp_path: Path) -> None:
    if saved:
        compiled.save(tmp_path / "artifact")
        compiled = rc.load(tmp_path / "artifact")
    run, sample = compiled.dispatcher(budget=2), torch.randn(2, 16)
    run(step=0, sample=sample)
    other = Small()
    compiled.refit(other.state_dict())
    torch.testing.assert_close(run(step=0, sample=sample), other(sample))


def test_features_that_are_slices_are_read_as_they_were_written(flux: nn.Module) -> None:
    """In a batch, what is cached is cut out of text and picture tokens: a view with other strides."""
    inputs, options = flux_inputs(batch=2), {"num_steps": NUM_STEPS, "order": 0, "hoist": False}
    eager, inductor = (
        rc.compile(
            flux, inputs, budgets=(3,), timesteps={"timestep": timesteps(batch=2)}, runtime=runtime, **options
        ).dispatcher(budget=3)
        for runtime in ("eager", "inductor")
    )
    for step in range(NUM_STEPS):
        this = loop_inputs(step, inputs)
        assert relative_error(inductor(step=step, **this)[0], eager(step=step, **this)[0]) <= 1e-5


COMPILER = """Command:
g++ -o x.o x.cpp

Output:
In file included from x.cpp:1:
x.cpp:7:10: fatal error: Python.h: No such file or directory
compilation terminated."""


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (RuntimeError(COMPILER), "x.cpp:7:10: fatal error: Python.h: No such file or directory"),
        (
            CalledProcessError(1, "g++", output=b"ld: warning: a\nx.cpp:1:1: error: no\n2 errors generated"),
            "x.cpp:1:1: error: no",
        ),
        (RuntimeError("one\ntwo\n"), "two"),
    ],
)
def test_the_first_error_of_a_compiler_is_told(error: Exception, line: str) -> None:
    assert first_complaint(error) == line


def test_a_missing_triton_is_named_before_anything_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inductor, "find_spec", lambda name: None)
    Inductor().require_on(torch.device("cpu"))
    with pytest.raises(RuntimeUnavailableError, match=r"the package triton, .* is missing; pip install triton"):
        Inductor().require_on(torch.device("cuda"))
    told: list[str] = []
    assert get_runtime("auto", told.append, device=torch.device("cuda")).name != "inductor"
    assert "the package triton" in told[0]
