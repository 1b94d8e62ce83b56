from pathlib import Path
from subprocess import CalledProcessError
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import recache_compile as rc
from recache_compile.capture.capture import capture
from recache_compile.errors import RuntimeUnavailableError
from recache_compile.runtimes import inductor
from recache_compile.runtimes.inductor import Inductor, first_complaint, with_parameters
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


class Copies(TorchDispatchMode):
    """Notes the bytes of every tensor that is made with memory of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and type(result) in (Tensor, nn.Parameter) and not result.is_meta:
            given = {each.untyped_storage().data_ptr() for each in args if type(each) in (Tensor, nn.Parameter)}
            if result.untyped_storage().data_ptr() not in given:
                self.made.append(result.nbytes)
        return result


@torch.no_grad()
def test_the_compiler_copies_no_weight(tmp_path: Path) -> None:
    module = Small()
    program = capture(module, {"sample": torch.ones(2, 16)}).program
    cpu, files = torch.device("cpu"), [tmp_path / "program.pt2"]
    with Copies() as copies:
        Inductor().lower(program, cpu, files)
        engine = Inductor().load(program, files, program.weights, cpu)
    assert max(copies.made, default=0) < min(weight.nbytes for weight in module.parameters() if weight.dim() == 2)
    torch.testing.assert_close(engine([torch.ones(2, 16)])[0], module(torch.ones(2, 16)))


@torch.no_grad()
def test_weights_become_parameters_where_they_lie() -> None:
    module = Small()
    program = capture(module, {"sample": torch.ones(2, 16)}).program
    rewritten = with_parameters(program)
    state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    assert not dict(rewritten.named_buffers())
    for name, weight in rewritten.named_parameters():
        assert weight.data_ptr() == state[name].data_ptr()


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


@pytest.mark.parametrize("kernel", ["flash", "mem_efficient", "math", "cudnn"])
def test_switches_of_attention_are_facts_of_lowering(kernel: str) -> None:
    cpu, switch = torch.device("cpu"), getattr(torch.backends.cuda, f"enable_{kernel}_sdp")
    before, was = Inductor().lowering_facts(cpu), getattr(torch.backends.cuda, f"{kernel}_sdp_enabled")()
    switch(not was)
    try:
        assert Inductor().lowering_facts(cpu) != before
    finally:
        switch(was)
    assert Inductor().lowering_facts(cpu) == before
