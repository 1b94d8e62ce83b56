"""Calling a TensorRT engine, with a stand-in for the library that runs the program itself, on the CPU."""

import ctypes
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import recache_compile as rc
from recache_compile.errors import DispatchError, RuntimeUnavailableError
from recache_compile.ir.program import Program
from recache_compile.runtimes._tensorrt_engine import ALIGNMENT, TensorRTEngine
from tests.compiler.test_build import relative_error

CPU = torch.device("cpu")


class Context:
    """An execution context that reads and writes the addresses it was given."""

    def __init__(self, program: Program) -> None:
        self._program = program
        self.addresses: dict[str, int] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.calls = 0

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = shape
        return shape[0] <= 8

    def update_device_memory_size_for_shapes(self) -> int:
        return 1000

    def set_device_memory(self, address: int, size: int) -> None:
        assert size == 1000

    def execute_async_v3(self, stream: int) -> bool:
        self.calls += 1
        program = self._program
        weights = {name: self._read(name, weight.shape) for name, weight in program.weights.items()}
        inputs = [self._read(value.name, self.shapes.get(value.name, value.shape)) for value in program.inputs]
        graph = torch.fx.GraphModule(weights, program.module.graph)
        for value, result in zip(program.outputs, graph(*inputs), strict=True):
            ctypes.memmove(self.addresses[value.name], result.contiguous().data_ptr(), result.nbytes)
        return True

    def _read(self, name: str, shape: Any) -> torch.Tensor:
        size = 4 * torch.Size(shape).numel()
        data = bytearray(ctypes.string_at(self.addresses[name], size))
        return torch.frombuffer(data, dtype=torch.float32).reshape(shape)


class Library:
    """An `ICudaEngine` of a program."""

    def __init__(self, program: Program) -> None:
        self._program = program
        self.contexts: list[Context] = []

    def create_execution_context(self, config: Any) -> Context:
        self.contexts.append(Context(self._program))
        return self.contexts[-1]


@pytest.fixture
def stream(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """The current stream; its handle may be changed."""
    current = SimpleNamespace(cuda_stream=1)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)
    monkeypatch.setattr(torch.cuda, "device", lambda device: torch.no_grad())
    yield current


@pytest.fixture
def made(eager: rc.Compiled, stream: SimpleNamespace) -> tuple[TensorRTEngine, Library, Program, list[torch.Tensor]]:
    program = eager.variants[0].programs["forecast"]
    library = Library(program)
    weights = {name: aligned(weight) for name, weight in eager.weights.items()}
    inputs = [torch.randn([size or 3 for size in value.shape]) for value in program.inputs]
    return TensorRTEngine(program, library, None, weights, CPU), library, program, inputs


def aligned(tensor: torch.Tensor, offset: int = 0) -> torch.Tensor:
    """The same values at an address that is so many bytes off."""
    room = torch.empty(tensor.numel() + 2 * ALIGNMENT // 4)
    begin = (-room.data_ptr() % ALIGNMENT + offset) // 4
    return room[begin : begin + tensor.numel()].view(tensor.shape).copy_(tensor)


def test_results_are_those_of_the_program(made: Any) -> None:
    engine, _, program, inputs = made
    for given in (inputs, [aligned(tensor, 4) for tensor in inputs]):
        (result,) = engine(given)
        assert relative_error(result, program.module(*inputs)[0]) <= 1e-6


def test_each_stream_has_one_context(made: Any, stream: SimpleNamespace) -> None:
    engine, library, _, inputs = made
    for handle in (1, 2, 1, 2):
        stream.cuda_stream = handle
        engine(inputs)
    assert [context.calls for context in library.contexts] == [2, 2]


def test_an_engine_apart_has_contexts_of_its_own(made: Any) -> None:
    engine, library, _, inputs = made
    assert torch.equal(engine(inputs)[0], engine.concurrent()(inputs)[0])
    assert len(library.contexts) == 2


def test_other_weights_are_bound_in_every_context(made: Any, eager: rc.Compiled) -> None:
    engine, _, _, inputs = made
    engine(inputs)
    zeros = {name: aligned(torch.zeros_like(weight)) for name, weight in eager.weights.items()}
    engine.use(zeros)
    assert not engine(inputs)[0].any()


def test_weights_that_are_not_aligned_are_refused(made: Any, eager: rc.Compiled) -> None:
    engine, *_ = made
    with pytest.raises(RuntimeUnavailableError, match=r"does not begin at a multiple of 256 bytes; save the artifact"):
        engine.use({name: aligned(weight, 4) for name, weight in eager.weights.items()})


def test_what_the_library_refuses_is_an_error(eager: rc.Compiled, stream: SimpleNamespace) -> None:
    program = eager.variants[0].programs["prologue"]
    weights = {name: aligned(weight) for name, weight in eager.weights.items()}
    engine = TensorRTEngine(program, Library(program), None, weights, CPU)
    inputs = [torch.rand([9 if size is None else size for size in value.shape]) for value in program.inputs]
    with pytest.raises(
        DispatchError, match=r"prologue: TensorRT refused the shape of timestep@.*; rebuild the engines"
    ):
        engine(inputs)
