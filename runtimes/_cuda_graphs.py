"""CUDA graphs: a step's engine is recorded once and then replayed, without its launches."""

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from recache_compile.errors import DispatchError, RuntimeUnavailableError, reason_of
from recache_compile.ir.value import Kind
from recache_compile.runtimes.base import Runtime, Variant

Call = Callable[[], Sequence[Tensor]]
Recorder = Callable[[Call], tuple[Callable[[], None], Sequence[Tensor]]]
"""Records a call: what runs it again, and the tensors that each run writes."""


@dataclass(frozen=True, slots=True)
class RecordedCall:
    """A recorded engine call.

    Args:
        replay: runs it again.
        inputs: the tensors it reads, history among them.
        outputs: the tensors it writes.
    """

    replay: Callable[[], None]
    inputs: Sequence[Tensor]
    outputs: Sequence[Tensor]


class CudaGraphs:
    """The recorded engines of one guidance branch at one shape.

    What a graph reads and writes never moves: history lies in ring slots that are made once
    and that features are copied to; all other inputs are copied to places of their own
    before a replay, and results out of it.

    Args:
        variant: the engines.
        recorder: records a call; None: as a CUDA graph on the device of the engines.
    """

    def __init__(self, variant: Variant, recorder: Recorder | None = None) -> None:
        self._variant = variant
        self._recorder = CudaGraphRecorder(variant.device) if recorder is None else recorder
        self._recorded: dict[str, RecordedCall] = {}
        self._slots: dict[tuple[int | None, int | None], Tensor] = {}

    def run(self, name: str, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The results of a program; its features are read before the next call, or lost.

        Args:
            name: of a step program.
            inputs: as of the engine; history as `keep` returned it.
        """
        with _plain_tensors():
            recorded = self._recorded.get(name) or self._record(name, inputs)
            for place, given in zip(recorded.inputs, inputs, strict=True):
                if place is not given:
                    place.copy_(given)
            recorded.replay()
            values = self._variant.programs[name].outputs
            return [
                result if value.kind is Kind.FEATURE else result.clone()
                for value, result in zip(values, recorded.outputs, strict=True)
            ]

    def keep(self, site: int | None, slot: int | None, feature: Tensor) -> Tensor:
        """A ring slot that holds this feature from now on."""
        with _plain_tensors():
            if (site, slot) not in self._slots:
                self._slots[site, slot] = torch.empty_like(feature)
            return self._slots[site, slot].copy_(feature)

    def _record(self, name: str, inputs: Sequence[Tensor]) -> RecordedCall:
        values = self._variant.programs[name].inputs
        places = [
            given if value.kind is Kind.HISTORY else given.clone() for value, given in zip(values, inputs, strict=True)
        ]
        engine = self._variant.engines[name].concurrent()
        try:
            replay, outputs = self._recorder(lambda: engine(places))
        except RuntimeError as error:
            raise DispatchError(
                f"{name}: cannot be part of a CUDA graph ({reason_of(error)}); load or compile with cuda_graphs=False"
            ) from error
        self._recorded[name] = RecordedCall(replay, places, outputs)
        return self._recorded[name]


@contextlib.contextmanager
def _plain_tensors() -> Iterator[None]:
    """Whatever mode the caller is in, tensors are made that can be written to in any other."""
    with torch.inference_mode(False), torch.no_grad():
        yield


class CudaGraphRecorder:
    """Records in one memory pool and on one stream, whose graphs are never replayed at the same time.

    Args:
        device: of the engines.
    """

    _recording = threading.Lock()

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)

    def __call__(self, call: Call) -> tuple[Callable[[], None], Sequence[Tensor]]:
        """Run once, so that every kernel is loaded, then record."""
        with self._recording, torch.cuda.device(self._device):
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                call()
            torch.cuda.current_stream().wait_stream(self._stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                outputs = call()
        return graph.replay, outputs


def check_graphs(runtime: Runtime, device: torch.device) -> None:
    """Raise `RuntimeUnavailableError` where engines of programs captured on a device cannot be part of CUDA graphs."""
    place = runtime.engine_device(device)
    if place.type != "cuda" or not runtime.capturable:
        raise RuntimeUnavailableError(
            f"CUDA graphs: cannot be made of engines of runtime {runtime.name} on {place}; leave them out"
            " (cuda_graphs=False, --no-cuda-graphs)"
        )
