"""CUDA graphs: a step's engine is recorded once and then replayed, without its launches."""

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor
from typing_extensions import override

from recache_compile.errors import DispatchError, RuntimeUnavailableError, check_memory, reason_of
from recache_compile.ir.program import REQUESTS, Program
from recache_compile.ir.value import Kind, Value
from recache_compile.runtimes.base import Engine, Runtime, Variant

Call = Callable[[], Sequence[Tensor]]
Places = dict[tuple[Value, int], tuple[Tensor, Tensor | None]]
"""Where inputs lie, by their rows where their number is free, and what was copied there last if nobody writes to it."""


class Recorder(Protocol):
    """Records calls on one device, and lets one of them run at a time."""

    def record(self, call: Call) -> tuple[Callable[[], None], Sequence[Tensor]]:
        """What runs a call again, and the tensors that each run writes."""
        ...

    def turn(self) -> contextlib.AbstractContextManager[None]:
        """What is enqueued inside runs after what others have enqueued so, and before what they will."""
        ...


@dataclass(frozen=True, slots=True)
class RecordedCall:
    """A recorded engine call.

    Args:
        replay: runs it again.
        outputs: the tensors it writes.
    """

    replay: Callable[[], None]
    outputs: Sequence[Tensor]


class GraphedEngine(Engine):
    """An engine that is recorded at its first call and then replayed, whoever calls it.

    What a graph reads and writes never moves: inputs are copied to their places before a
    replay, and results out of it.  A program that serves gaps has a recording for each power of
    two: the steps of a call are rounded up to one.

    Args:
        program: what the engine was built from.
        engine: is recorded.
        places: of the inputs that programs have in common; added to.
        recorder: of the device.
    """

    def __init__(self, program: Program, engine: Engine, places: Places, recorder: Recorder) -> None:
        self._program = program
        self._engine = engine.concurrent()
        self._places = places
        self._recorder = recorder
        self._recorded: dict[int, RecordedCall] = {}

    @override
    def __call__(self, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        pairs = list(zip(self._program.inputs, inputs, strict=True))
        steps = next((len(given) for value, given in pairs if None in value.shape), 0)
        rows = 1 << (steps - 1).bit_length() if steps else 0
        with _plain_tensors(), self._recorder.turn():
            places = [self._place(value, given, rows) for value, given in pairs]
            if rows not in self._recorded:
                self._recorded[rows] = self._record(places)
            self._recorded[rows].replay()
            outputs = self._recorded[rows].outputs
            return [result[:steps].clone() if steps else result.clone() for result in outputs]

    @override
    def use(self, weights: Mapping[str, Tensor]) -> None:
        with self._recorder.turn():
            self._engine.use(weights)
            self._recorded.clear()

    def _place(self, value: Value, given: Tensor, rows: int) -> Tensor:
        """The memory of an input, which holds these values now; what nobody writes to is copied where it is another."""
        free = None in value.shape
        key = value, rows if free else 0
        place, held = self._places.get(key, (None, None))
        if place is None:
            place = given.new_zeros((rows, *given.shape[1:]) if free else given.shape)
        if given is not held:
            (place[: len(given)] if free else place).copy_(given)
        self._places[key] = place, given if value.kind in (Kind.FIXED, Kind.HISTORY) else None
        return place

    def _record(self, places: Sequence[Tensor]) -> RecordedCall:
        try:
            replay, outputs = self._recorder.record(lambda: self._engine(places))
        except RuntimeError as error:
            check_memory(error)
            raise DispatchError(
                f"{self._program.name}: cannot be part of a CUDA graph ({reason_of(error)}); load or compile with"
                " cuda_graphs=False"
            ) from error
        return RecordedCall(replay, outputs)


def with_graphs(variant: Variant, recorder: Recorder | None = None) -> Variant:
    """The same variant, the engines of whose steps are recorded and replayed.

    Args:
        variant: the engines; those of all dispatchers, branches and starts, which share the recordings.
        recorder: of its device; None: the one that records CUDA graphs there.
    """
    places: Places = {}
    used = recorder_of(variant.device) if recorder is None else recorder
    engines = {
        name: engine if name in ("prologue", REQUESTS) else GraphedEngine(variant.programs[name], engine, places, used)
        for name, engine in variant.engines.items()
    }
    return replace(variant, engines=engines)


@contextlib.contextmanager
def _plain_tensors() -> Iterator[None]:
    """Whatever mode the caller is in, tensors are made that can be written to in any other."""
    with torch.inference_mode(False), torch.no_grad():
        yield


class CudaGraphRecorder(Recorder):
    """Records CUDA graphs in one memory pool, so none of them is replayed at the same time as another.

    Args:
        device: of the engines.
    """

    _recording = threading.Lock()

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)
        self._turn = threading.Lock()
        self._done: torch.cuda.Event | None = None

    @override
    def record(self, call: Call) -> tuple[Callable[[], None], Sequence[Tensor]]:
        """Run once, so that every kernel is loaded, then record."""
        with self._recording, torch.cuda.device(self._device), stream_kept():
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                call()
            torch.cuda.current_stream().wait_stream(self._stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                outputs = call()
        return graph.replay, outputs

    @override
    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        with self._turn, torch.cuda.device(self._device):
            current = torch.cuda.current_stream()
            if self._done is not None:
                current.wait_event(self._done)
            try:
                yield
            finally:
                self._done = current.record_event()


def recorder_of(device: torch.device) -> CudaGraphRecorder:
    """The one recorder of a device."""
    with _RECORDERS:
        return _new_recorder(device)


_RECORDERS = threading.Lock()
_new_recorder = functools.cache(CudaGraphRecorder)


@contextlib.contextmanager
def stream_kept() -> Iterator[None]:
    """The caller's stream is the current one again afterwards, also where a recording fails, which leaves its own."""
    before = torch.cuda.current_stream()
    try:
        yield
    finally:
        torch.cuda.set_stream(before)


def check_graphs(runtime: Runtime, device: torch.device) -> None:
    """Raise `RuntimeUnavailableError` where engines of programs captured on a device cannot be part of CUDA graphs."""
    place = runtime.engine_device(device)
    if place.type != "cuda" or not runtime.capturable:
        raise RuntimeUnavailableError(
            f"CUDA graphs: cannot be made of engines of runtime {runtime.name} on {place}; leave them out"
            " (cuda_graphs=False, --no-cuda-graphs)"
        )
