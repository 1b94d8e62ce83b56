"""Weights that are on the device only while the one program that reads them runs."""

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor
from typing_extensions import override

from recache_compile.runtimes.base import Engine


class OffloadedEngine(Engine):
    """An engine some of whose weights live in the host's memory.

    Each call brings them to the device and gives their memory back.  Calls of several
    threads wait for each other.

    Args:
        load: makes the engine that reads these weights.
        weights: all that it reads, by name.
        offloaded: names of those that are not on the device.
        device: of the engine.
    """

    def __init__(
        self,
        load: Callable[[Mapping[str, Tensor]], Engine],
        weights: Mapping[str, Tensor],
        offloaded: set[str],
        device: torch.device,
    ) -> None:
        self._device = device
        self._offloaded = offloaded
        self._running = threading.Lock()
        self.use(weights)
        with self._all_on_device() as present:
            self._engine = load(present)

    @override
    def __call__(self, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        with self._running, self._all_on_device() as present:
            self._engine.use(present)
            return self._engine(inputs)

    @override
    def use(self, weights: Mapping[str, Tensor]) -> None:
        self._weights = weights

    @contextlib.contextmanager
    def _all_on_device(self) -> Iterator[Mapping[str, Tensor]]:
        """All weights on the device, for as long as the block lasts."""
        brought = {name: torch.empty_like(self._weights[name], device=self._device) for name in self._offloaded}
        try:
            for name, weight in brought.items():
                weight.copy_(self._weights[name])  # waits, so that new weights are never half of a copy
            yield {**self._weights, **brought}
        finally:
            for weight in brought.values():
                weight.untyped_storage().resize_(0)  # the engine may hold the tensor, but not its memory


def on_host(weight: Tensor, device: torch.device) -> Tensor:
    """A weight in the host's memory, from where it gets to the device fast."""
    return weight.pin_memory() if device.type == "cuda" else weight
