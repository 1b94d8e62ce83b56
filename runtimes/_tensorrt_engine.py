"""Calling an engine of TensorRT: addresses, shapes, streams and scratch memory."""

import threading
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from recache_compile.errors import DispatchError, RuntimeUnavailableError
from recache_compile.ir.program import Program
from recache_compile.runtimes.base import Engine, new_outputs

ALIGNMENT = 256
"""Bytes that addresses are multiples of."""


class TensorRTEngine(Engine):
    """A deserialised engine, and an execution context for every stream that it is called on.

    Scratch memory comes from PyTorch for each call, so that calls in flight never share it,
    also where they are part of CUDA graphs.  Threads wait for each other while they enqueue.
    On the default stream, where TensorRT would make the host wait, a stream of its own runs
    between the work before and the work after it.

    Args:
        program: what it was built from.
        engine: an `ICudaEngine`.
        config: what its contexts are made with.
        weights: by name.
        device: of the engine.
    """

    def __init__(
        self, program: Program, engine: Any, config: Any, weights: Mapping[str, Tensor], device: torch.device
    ) -> None:
        self._program = program
        self._engine = engine
        self._config = config
        self._device = device
        self._contexts: dict[int, Any] = {}
        self._enqueuing = threading.Lock()
        self._aside: torch.cuda.Stream | None = None
        self.use(weights)

    def __call__(self, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        """Enqueue; nothing waits on the host."""
        given = [tensor.clone() if tensor.data_ptr() % ALIGNMENT else tensor for tensor in inputs]
        outputs = new_outputs(self._program, given, self._device)
        current = torch.cuda.current_stream(self._device)
        with self._enqueuing:
            if current.cuda_stream:
                self._enqueue(given, outputs, current)
                return outputs
            if self._aside is None:
                self._aside = torch.cuda.Stream(self._device)
            self._aside.wait_stream(current)
            try:
                with torch.cuda.stream(self._aside):
                    self._enqueue(given, outputs, self._aside)
            finally:
                current.wait_stream(self._aside)
        return outputs

    def use(self, weights: Mapping[str, Tensor]) -> None:
        """Bind other tensors from the next call on."""
        own = {name: weights[name] for name in self._program.weights}
        for name, weight in own.items():
            if weight.data_ptr() % ALIGNMENT:
                raise RuntimeUnavailableError(
                    f"TensorRT: weight {name} does not begin at a multiple of {ALIGNMENT} bytes; save the artifact and"
                    " load it"
                )
        with self._enqueuing:
            self._weights = own
            for context in self._contexts.values():
                self._bind(context, own)

    def concurrent(self) -> Engine:
        """An engine with contexts of its own, on the same weights."""
        return TensorRTEngine(self._program, self._engine, self._config, self._weights, self._device)

    def _enqueue(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor], stream: torch.cuda.Stream) -> None:
        context = self._contexts.get(stream.cuda_stream)
        if context is None:
            with torch.cuda.device(self._device):
                context = self._contexts[stream.cuda_stream] = self._engine.create_execution_context(self._config)
            self._bind(context, self._weights)
        for value, tensor in zip(self._program.inputs, inputs, strict=True):
            if value.free_at:
                self._expect(context.set_input_shape(value.name, tuple(tensor.shape)), f"shape of {value.name}")
        self._bind(context, {value.name: tensor for value, tensor in zip(self._program.inputs, inputs, strict=True)})
        self._bind(context, {value.name: tensor for value, tensor in zip(self._program.outputs, outputs, strict=True)})
        size = context.update_device_memory_size_for_shapes()
        scratch = torch.empty(size, dtype=torch.uint8, device=self._device)
        context.set_device_memory(scratch.data_ptr(), size)
        self._expect(context.execute_async_v3(stream.cuda_stream), "call")

    def _bind(self, context: Any, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            self._expect(context.set_tensor_address(name, tensor.data_ptr()), f"address of {name}")

    def _expect(self, done: bool, what: str) -> None:
        if not done:
            raise DispatchError(f"{self._program.name}: TensorRT refused the {what}; rebuild the engines")
