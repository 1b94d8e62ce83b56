"""ONNX Runtime on the CPU or a CUDA GPU: one model per program, all reading the same weights."""

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recache_compile.errors import RuntimeUnavailableError, importing, reason_of
from recache_compile.program import Program
from recache_compile.runtimes.base import Engine, output_shapes
from recache_compile.runtimes.onnx_program import export_onnx, link_weights, onnx_file, runnable

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


@dataclass(frozen=True, slots=True)
class OnnxRuntime:
    """ONNX Runtime; inputs, outputs and weights are bound where PyTorch has them."""

    name: str = "onnxruntime"

    def files(self, variant: int, program: str) -> tuple[str, ...]:
        """Beside the weights, as ONNX asks for of external data."""
        return (onnx_file(variant, program),)

    def key(self, device: torch.device) -> str | None:
        """Models fit every machine; sessions are made of them when they are loaded."""
        return None

    def require(self) -> None:
        """Needs the extra `onnx`."""
        with importing(f"runtime {self.name}", "pip install 'recache-compile[onnx]'"):
            import onnx  # noqa: F401
            import onnxruntime  # noqa: F401
            import onnxscript  # noqa: F401

    def lower(self, program: Program, device: torch.device, files: Sequence[Path]) -> None:
        """Export; the weights become inputs."""
        export_onnx(program, device, files[0])

    def link(self, files: Sequence[Path], weights: Path, prefix: str) -> None:
        """Make the weights external data of the model."""
        link_weights(files[0], weights, prefix)

    def load(
        self, program: Program, files: Sequence[Path], weights: Mapping[str, Tensor], device: torch.device
    ) -> Engine:
        """A session, and one binding for every thread that calls it."""
        session = _session(program, files[0], device)
        bindings = threading.local()
        names = [value.name for value in program.inputs]
        results = program.outputs
        own = {name: weights[name] for name in program.weights}

        def bound() -> Any:
            binding = session.io_binding()
            for name, weight in own.items():
                _bind(binding.bind_input, name, weight)
            return binding

        def engine(inputs: Sequence[Tensor]) -> Sequence[Tensor]:
            if not hasattr(bindings, "value"):
                bindings.value = bound()
            outputs = [
                torch.empty(shape, dtype=value.dtype, device=device)
                for value, shape in zip(results, output_shapes(program, inputs), strict=True)
            ]
            for name, tensor in zip(names, inputs, strict=True):
                _bind(bindings.value.bind_input, name, tensor)
            for value, tensor in zip(results, outputs, strict=True):
                _bind(bindings.value.bind_output, value.name, tensor)
            session.run_with_iobinding(bindings.value)
            return outputs

        return engine


def _bind(bind: Any, name: str, tensor: Tensor) -> None:
    """Let a session read or write a tensor's memory."""
    from onnx_ir.tensor_adapters import from_torch_dtype

    index = tensor.device.index or 0
    bind(name, tensor.device.type, index, int(from_torch_dtype(tensor.dtype)), tuple(tensor.shape), tensor.data_ptr())


def _session(program: Program, file: Path, device: torch.device) -> Any:
    import onnxruntime

    provider = PROVIDERS.get(device.type)
    if provider not in onnxruntime.get_available_providers():
        raise RuntimeUnavailableError(
            f"runtime onnxruntime: this onnxruntime has no {provider or 'provider'} for {device}; pip install onnxruntime-gpu"
        )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    settings: dict[str, Any] = {}
    if device.type == "cuda":
        settings = {
            "device_id": device.index or 0,
            "user_compute_stream": str(torch.cuda.current_stream(device).cuda_stream),
        }
    try:
        return onnxruntime.InferenceSession(runnable(file), options, providers=[(provider, settings)])
    except Exception as error:  # the package raises a class for each of its status codes
        raise RuntimeUnavailableError(
            f"runtime onnxruntime: {program.name} cannot be run: {reason_of(error)}"
        ) from error
