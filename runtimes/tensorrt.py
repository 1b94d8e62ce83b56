"""TensorRT and TensorRT-RTX, which share one Python API: one engine per program, built from its ONNX model.

Networks are strongly typed: an engine computes in the types of its program, so that the
precision is that of the model which was compiled.  Weights are inputs of the engines: all
of them read the one copy that PyTorch holds, new values reach them at once, and TensorRT-RTX
builds for other GPUs on a machine that has none.
"""

import contextlib
import importlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recache_compile.errors import DispatchError, RuntimeUnavailableError, importing
from recache_compile.files import writing
from recache_compile.program import MIN_ROWS, Program
from recache_compile.runtimes.base import EXAMPLE_ROWS, Absent, Engine, new_outputs
from recache_compile.runtimes.onnx_program import export_onnx, link_weights, onnx_file, require_onnx, runnable

MAX_ROWS = 1000
"""Rows that a prologue can make in one call: the longest loop."""

ALIGNMENT = 256
"""Bytes that addresses of inputs are multiples of."""


@dataclass(frozen=True, slots=True)
class TensorRT:
    """One of the two libraries, and how engines are built; None leaves its own default.

    Args:
        name: of the runtime and of the Python module.
        targets: compute capabilities to build for ("sm89"), with TensorRT-RTX; by default
            the library's choice, Ampere and newer.  TensorRT builds for the GPU it is on.
        workspace: bytes of scratch memory that building may use.
        optimization_level: how long building looks for better kernels, 0..5.
        timing_cache: file that TensorRT reads and adds to, so that building again is fast.
        tf32: whether float32 products may round their factors to 10 bits.
        version_compatible: engines also run on later versions of the library.
        hardware_compatible: engines of TensorRT also run on other GPUs, Ampere and newer.
    """

    name: str
    capturable = True
    targets: tuple[str, ...] = ()
    workspace: int | None = None
    optimization_level: int | None = None
    timing_cache: Path | None = None
    tf32: bool = False
    version_compatible: bool = False
    hardware_compatible: bool = False

    def files(self, variant: int, program: str) -> tuple[str, ...]:
        """The engine, and the ONNX model that it was built from."""
        return f"engines/{variant}/{program}.engine", onnx_file(variant, program)

    def place(self, device: torch.device) -> torch.device:
        """On a GPU, wherever the model was captured."""
        return device if device.type == "cuda" else torch.device("cuda")

    def key(self, device: torch.device) -> Mapping[str, str]:
        """The library's version and the GPUs' compute capabilities."""
        gpu = " or ".join(self.targets)
        if not gpu:
            gpu = "sm80+" if self._is_rtx or self.hardware_compatible else _capability(device)
        return {self.name: self._trt().__version__ + "+" * self.version_compatible, "gpu": gpu}

    def here(self, device: torch.device) -> Mapping[str, str]:
        """The library's version and the device's compute capability."""
        return {self.name: self._trt().__version__, "gpu": _capability(device)}

    def require(self, building: bool) -> None:
        """Needs the library; building needs the extra `onnx`, and TensorRT a GPU, TensorRT-RTX none."""
        trt = self._trt()
        if not building:
            return
        require_onnx(f"runtime {self.name}")
        if self._is_rtx:
            known = [each for each in dir(trt.ComputeCapability) if each.startswith("SM")]
            for target in self.targets:
                if target.upper() not in known:
                    raise RuntimeUnavailableError(
                        f"runtime {self.name}: target {target!r} is unknown; choose among {', '.join(known).lower()}"
                    )
            if self.timing_cache or self.hardware_compatible:
                raise RuntimeUnavailableError(
                    f"runtime {self.name}: takes no timing cache and no hardware compatibility, it picks its kernels on the"
                    " GPU that runs them; leave them out, or choose runtime tensorrt"
                )
        elif self.targets:
            raise RuntimeUnavailableError(
                f"runtime {self.name}: builds for the GPU it is on; leave the targets out, or choose runtime tensorrt_rtx"
            )
        elif not torch.cuda.is_available():
            raise RuntimeUnavailableError(
                f"runtime {self.name}: builds on a GPU and finds none; choose runtime tensorrt_rtx, which needs none"
            )

    def lower(self, program: Program, device: torch.device, files: Sequence[Path]) -> None:
        """Export and build."""
        engine, model = files
        export_onnx(program, device, model)
        engine.write_bytes(self.build(model, program.name))

    def link(self, files: Sequence[Path], weights: Path, prefix: str) -> None:
        """Make the weights external data of the ONNX model; the engine gets them when it is loaded."""
        link_weights(files[1], weights, prefix)

    def load(
        self, program: Program, files: Sequence[Path], weights: Mapping[str, Tensor], device: torch.device
    ) -> Engine:
        """An engine on a GPU; elsewhere one that can only be saved."""
        if device.type != "cuda":
            return Absent(
                f"engines of runtime {self.name} run on a CUDA GPU, the model was compiled on {device}; save the artifact and"
                " load it there"
            )
        with self._logging() as logger:
            runtime = self._trt().Runtime(logger)
            loaded = runtime.deserialize_cuda_engine(files[0].read_bytes())
            if loaded is None:
                raise RuntimeUnavailableError(
                    f"runtime {self.name}: {program.name} cannot be loaded: {logger.reason()}"
                )
        return TensorRTEngine(self._trt(), program, loaded, weights, device)

    def build(self, model: Path, name: str) -> bytes:
        """The serialised engine of an ONNX model whose weights are inputs.

        Args:
            model: an ONNX file; data outside of it are not read.
            name: of the program, for the message.

        Raises:
            RuntimeUnavailableError: naming the node that the library has no counterpart for,
                by the path of its module.
        """
        trt = self._trt()
        with self._logging() as logger:
            builder = trt.Builder(logger)
            network = self.parse(builder, model, name, logger)
            config = self._config(builder, network)
            with self._timings(config):
                plan = builder.build_serialized_network(network, config)
            if plan is None:
                raise RuntimeUnavailableError(f"runtime {self.name}: {name} cannot be built: {logger.reason()}")
            return bytes(plan)

    def parse(self, builder: Any, model: Path, name: str, logger: Any) -> Any:
        """The network of an ONNX model; arguments and errors as of `build`."""
        trt = self._trt()
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = trt.OnnxParser(network, logger)
        if not parser.parse(runnable(model)):
            error = parser.get_error(0)
            raise RuntimeUnavailableError(
                f"runtime {self.name}: {name} cannot be built, at {error.node_name() or 'the model'}:"
                f" {' '.join(error.desc().split())}"
            )
        return network

    @property
    def _is_rtx(self) -> bool:
        return self.name == "tensorrt_rtx"

    def _trt(self) -> Any:
        with importing(f"runtime {self.name}", f"pip install {self.name.replace('_', '-')}"):
            return importlib.import_module(self.name)

    @contextlib.contextmanager
    def _logging(self) -> Iterator[Any]:
        """A logger that keeps the errors, for the one that is raised."""
        trt = self._trt()

        class Kept(trt.ILogger):  # type: ignore[name-defined, misc]
            def __init__(self) -> None:
                super().__init__()
                self.messages: list[str] = []

            def log(self, severity: Any, message: str) -> None:
                if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                    self.messages.append(message)

            def reason(self) -> str:
                return " ".join(self.messages[0].split()) if self.messages else "it gave no reason"

        yield Kept()

    def _config(self, builder: Any, network: Any) -> Any:
        """The builder's settings, with the rows that a prologue makes."""
        trt = self._trt()
        config = builder.create_builder_config()
        flags = {"TF32": self.tf32, "VERSION_COMPATIBLE": self.version_compatible}
        if self._is_rtx:
            flags["REQUIRE_USER_ALLOCATION"] = True  # else nothing can be captured in a CUDA graph
            config.num_compute_capabilities = len(self.targets)
            for at, target in enumerate(self.targets):
                config.set_compute_capability(getattr(trt.ComputeCapability, target.upper()), at)
        for flag, wanted in flags.items():
            (config.set_flag if wanted else config.clear_flag)(getattr(trt.BuilderFlag, flag))
        if self.hardware_compatible:
            config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
        if self.workspace is not None:
            config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, self.workspace)
        if self.optimization_level is not None:
            config.builder_optimization_level = self.optimization_level
        free = {}
        for tensor in map(network.get_input, range(network.num_inputs)):
            if -1 in tuple(tensor.shape):
                free[tensor.name] = tuple(tensor.shape)
        if free:
            profile = builder.create_optimization_profile()
            for name, shape in free.items():
                sizes = (
                    [rows if size == -1 else size for size in shape] for rows in (MIN_ROWS, EXAMPLE_ROWS, MAX_ROWS)
                )
                profile.set_shape(name, *sizes)
            config.add_optimization_profile(profile)
        return config

    @contextlib.contextmanager
    def _timings(self, config: Any) -> Iterator[None]:
        """Read the timing cache, and write what was added to it."""
        if self.timing_cache is None:
            yield
            return
        known = self.timing_cache.read_bytes() if self.timing_cache.exists() else b""
        cache = config.create_timing_cache(known)
        config.set_timing_cache(cache, ignore_mismatch=False)
        yield
        with writing(self.timing_cache) as partial:
            partial.write_bytes(bytes(cache.serialize()))


class TensorRTEngine:
    """A deserialised engine, and an execution context for every stream that it is called on.

    Scratch memory comes from PyTorch for each call, so that calls in flight never share it,
    also where they are part of CUDA graphs.  Threads wait for each other while they enqueue.
    """

    def __init__(
        self, trt: Any, program: Program, engine: Any, weights: Mapping[str, Tensor], device: torch.device
    ) -> None:
        self._trt = trt
        self._program = program
        self._engine = engine
        self._device = device
        self._contexts: dict[int, Any] = {}
        self._enqueuing = threading.Lock()
        self.use(weights)

    def __call__(self, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        """Enqueue on the current stream; nothing waits."""
        stream = torch.cuda.current_stream(self._device).cuda_stream
        inputs = [_aligned(tensor) for tensor in inputs]
        outputs = new_outputs(self._program, inputs, self._device)
        with self._enqueuing:
            context = self._context(stream)
            for value, tensor in zip(self._program.inputs, inputs, strict=True):
                if None in value.shape:
                    context.set_input_shape(value.name, tuple(tensor.shape))
                context.set_tensor_address(value.name, tensor.data_ptr())
            for value, tensor in zip(self._program.outputs, outputs, strict=True):
                context.set_tensor_address(value.name, tensor.data_ptr())
            size = context.update_device_memory_size_for_shapes()
            scratch = torch.empty(size, dtype=torch.uint8, device=self._device)
            context.set_device_memory(scratch.data_ptr(), size)
            if not context.execute_async_v3(stream):
                raise DispatchError(f"{self._program.name}: TensorRT could not run it")
        return outputs

    def use(self, weights: Mapping[str, Tensor]) -> None:
        """Bind other tensors from the next call on."""
        with self._enqueuing:
            self._weights = {name: _aligned(weights[name]) for name in self._program.weights}
            for context in self._contexts.values():
                self._bind(context)

    def _context(self, stream: int) -> Any:
        """This stream's, with the weights bound."""
        if stream not in self._contexts:
            strategy = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
            self._contexts[stream] = self._engine.create_execution_context(strategy)
            self._bind(self._contexts[stream])
        return self._contexts[stream]

    def _bind(self, context: Any) -> None:
        for name, weight in self._weights.items():
            context.set_tensor_address(name, weight.data_ptr())


def _capability(device: torch.device) -> str:
    """A GPU's compute capability as "sm89"; of no GPU, "none"."""
    if not torch.cuda.is_available():
        return "none"
    return "sm" + "".join(map(str, torch.cuda.get_device_capability(device if device.type == "cuda" else None)))


def _aligned(tensor: Tensor) -> Tensor:
    """The tensor, or a copy where its address is not what engines ask for."""
    return tensor.clone() if tensor.data_ptr() % ALIGNMENT else tensor
