"""ONNX Runtime on the CPU or a CUDA GPU: one model per program, all reading the same weights."""

import contextlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recache_compile.errors import RuntimeUnavailableError, check_memory, importing, reason_of
from recache_compile.ir.program import Program
from recache_compile.runtimes._onnx_program import (
    export_onnx,
    exporter_facts,
    link_weights,
    onnx_file,
    require_onnx,
    runnable,
)
from recache_compile.runtimes.base import Engine, Runtime, new_outputs

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


class OnnxEngine(Engine):
    """A session, and one binding for every thread that calls it.

    On a GPU it runs on a stream of its own, and nothing waits for it on the host.
    """

    def __init__(self, program: Program, file: Path, weights: Mapping[str, Tensor], device: torch.device) -> None:
        import onnxruntime

        self._program = program
        self._device = device
        self._bindings = threading.local()
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._session = _session(program, file, device, self._stream)
        self._options = onnxruntime.RunOptions()
        self._options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        self.use(weights)

    def __call__(self, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        """Run where the tensors are; the results are written into new ones."""
        binding = self._binding()
        outputs = new_outputs(self._program, inputs, self._device)
        for value, tensor in zip(self._program.inputs, inputs, strict=True):
            _bind(binding.bind_input, value.name, tensor)
        for value, tensor in zip(self._program.outputs, outputs, strict=True):
            _bind(binding.bind_output, value.name, tensor)
        with self._on_its_stream():
            self._session.run_with_iobinding(binding, self._options)
        return outputs

    def use(self, weights: Mapping[str, Tensor]) -> None:
        """Bind other tensors, in each thread when it calls."""
        self._weights = {name: weights[name] for name in self._program.weights}

    @contextlib.contextmanager
    def _on_its_stream(self) -> Iterator[None]:
        """Let the session's stream wait for the current one, and then the other way round."""
        if self._stream is None:
            yield
            return
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        try:
            yield
        finally:
            current.wait_stream(self._stream)

    def _binding(self) -> Any:
        """This thread's, with the present weights bound."""
        weights = self._weights
        if getattr(self._bindings, "weights", None) is not weights:
            self._bindings.weights, self._bindings.value = weights, self._session.io_binding()
            for name, weight in weights.items():
                _bind(self._bindings.value.bind_input, name, weight)
        return self._bindings.value


@dataclass(frozen=True, slots=True)
class OnnxRuntime(Runtime):
    """ONNX Runtime; inputs, outputs and weights are bound where PyTorch has them."""

    name: str = "onnxruntime"
    capturable = False

    def files(self, variant: int, program: str) -> tuple[str, ...]:
        """Beside the weights, as ONNX asks for of external data."""
        return (onnx_file(variant, program),)

    def lowering_facts(self, device: torch.device) -> Mapping[str, str]:
        """The exporter's versions: a model holds no weight, and is optimised when it is loaded."""
        return exporter_facts()

    def lowers_apart(self, device: torch.device) -> bool:
        """On the CPU; another process would need memory of a GPU for itself."""
        return device.type == "cpu"

    def require(self, building: bool) -> None:
        """Needs the extra `onnx`; running needs no exporter."""
        if building:
            require_onnx(f"runtime {self.name}")
        with importing(f"runtime {self.name}", "pip install 'recache-compile[onnx]'"):
            import onnx  # noqa: F401
            import onnx_ir  # noqa: F401
            import onnxruntime  # noqa: F401

    def lower(self, program: Program, device: torch.device, files: Sequence[Path]) -> None:
        """Export; the weights become inputs."""
        export_onnx(program, device, files[0])

    def link(self, files: Sequence[Path], weights: Path, prefix: str) -> None:
        """Make the weights external data of the model."""
        link_weights(files[0], weights, prefix)

    def load(
        self, program: Program, files: Sequence[Path], weights: Mapping[str, Tensor], device: torch.device
    ) -> Engine:
        """A session on the device."""
        return OnnxEngine(program, files[0], weights, device)


def _bind(bind: Any, name: str, tensor: Tensor) -> None:
    """Let a session read or write a tensor's memory."""
    from onnx_ir.tensor_adapters import from_torch_dtype

    index = tensor.device.index or 0
    bind(name, tensor.device.type, index, int(from_torch_dtype(tensor.dtype)), tuple(tensor.shape), tensor.data_ptr())


def _session(program: Program, file: Path, device: torch.device, stream: torch.cuda.Stream | None) -> Any:
    import onnxruntime

    provider = PROVIDERS.get(device.type)
    if provider not in onnxruntime.get_available_providers():
        raise RuntimeUnavailableError(
            f"runtime onnxruntime: this onnxruntime has no {provider or 'provider'} for {device}; pip install"
            " onnxruntime-gpu"
        )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    settings: dict[str, Any] = {}
    if stream is not None:
        settings = {"device_id": device.index or 0, "user_compute_stream": str(stream.cuda_stream)}
    try:
        return onnxruntime.InferenceSession(runnable(file), options, providers=[(provider, settings)])
    except Exception as error:  # the package raises a class for each of its status codes
        check_memory(error)
        raise RuntimeUnavailableError(
            f"runtime onnxruntime: {program.name} cannot be run: {reason_of(error)}; choose another --dtype or"
            " --runtime"
        ) from error
