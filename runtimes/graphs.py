"""CUDA graphs: a step's engine is recorded once and then replayed, without its launches."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from recache_compile.errors import DispatchError, reason_of
from recache_compile.program import Kind
from recache_compile.runtimes.base import Variant

Call = Callable[[], Sequence[Tensor]]
Capture = Callable[[Call], tuple[Callable[[], None], Sequence[Tensor]]]
"""Records a call: what runs it again, and the tensors that each run writes."""


@dataclass(frozen=True, slots=True)
class Recorded:
    """A recorded engine call.

    Args:
        replay: runs it again.
        inputs: the tensors it reads, history among them.
        outputs: the tensors it writes.
    """

    replay: Callable[[], None]
    inputs: Sequence[Tensor]
    outputs: Sequence[Tensor]


class Graphs:
    """The recorded engines of one guidance branch at one shape.

    What a graph reads and writes never moves: history lies in ring slots that are made once
    and that features are copied to; all other inputs are copied to places of their own
    before a replay, and results out of it.

    Args:
        variant: the engines.
        capture: records a call.
    """

    def __init__(self, variant: Variant, capture: Capture | None = None) -> None:
        self._variant = variant
        self._capture = CudaCapture(variant.device) if capture is None else capture
        self._recorded: dict[str, Recorded] = {}
        self._slots: dict[tuple[int | None, int | None], Tensor] = {}

    def run(self, name: str, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The results of a program; its features are read before the next call, or lost.

        Args:
            name: of a step program.
            inputs: as of the engine; history as `keep` returned it.
        """
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
        if (site, slot) not in self._slots:
            self._slots[site, slot] = torch.empty_like(feature)
        return self._slots[site, slot].copy_(feature)

    def _record(self, name: str, inputs: Sequence[Tensor]) -> Recorded:
        values = self._variant.programs[name].inputs
        places = [
            given if value.kind is Kind.HISTORY else given.clone() for value, given in zip(values, inputs, strict=True)
        ]
        engine = self._variant.engines[name]
        try:
            replay, outputs = self._capture(lambda: engine(places))
        except RuntimeError as error:
            raise DispatchError(
                f"{name}: cannot be part of a CUDA graph ({reason_of(error)}); load or compile with cuda_graphs=False"
            ) from error
        self._recorded[name] = Recorded(replay, places, outputs)
        return self._recorded[name]


class CudaCapture:
    """Records in one memory pool, whose graphs are never replayed at the same time.

    Args:
        device: of the engines.
    """

    _recording = threading.Lock()
    _streams: ClassVar[dict[torch.device, torch.cuda.Stream]] = {}

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, call: Call) -> tuple[Callable[[], None], Sequence[Tensor]]:
        """Run once, so that every kernel is loaded, then record, both aside: one stream a device."""
        with self._recording, torch.cuda.device(self._device):
            aside = self._streams.setdefault(self._device, torch.cuda.Stream(self._device))
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                call()
            torch.cuda.current_stream().wait_stream(aside)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool, stream=aside, capture_error_mode="thread_local"):
                outputs = call()
        return graph.replay, outputs
