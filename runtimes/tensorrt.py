"""TensorRT and TensorRT for RTX, which share one Python API: one engine per program, built from its ONNX model.

Networks are strongly typed: an engine computes in the types of its program, so that the
precision is that of the model which was compiled.  Weights are inputs of the engines: all
of them read the one copy that PyTorch holds, new values reach them at once, and TensorRT for
RTX builds for other GPUs on a machine that has none.
"""

import abc
import contextlib
import importlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from recache_compile.errors import RuntimeUnavailableError, importing, reason_of
from recache_compile.ir.gaps import steps_per_call
from recache_compile.ir.program import MIN_ROWS, REQUESTS, Program
from recache_compile.runtimes._onnx_program import (
    export_onnx,
    exporter_facts,
    link_weights,
    onnx_file,
    require_onnx,
    runnable,
)
from recache_compile.runtimes._tensorrt_engine import TensorRTEngine
from recache_compile.runtimes.base import EXAMPLE_ROWS, Engine, Runtime, UnavailableEngine
from recache_compile.support.devices import on_device
from recache_compile.support.files import writing

Profile = Mapping[str, Sequence[Sequence[int]]]
"""Smallest, usual and largest shape of inputs, by name."""

MAX_REQUESTS = 16
"""Requests that a recompute call can serve."""

MAX_ROWS = 1000
"""Rows that a prologue can make in one call: the longest loop."""


class TensorRTBase(Runtime, abc.ABC):
    """What the two libraries have in common; both are runtimes."""

    name: str
    capturable = True
    max_requests = MAX_REQUESTS
    sizes_are_bounded = True
    workspace: int | None
    optimization_level: int | None
    tf32: bool

    def files(self, variant: int, program: str) -> tuple[str, ...]:
        """The engine, and the ONNX model that it was built from."""
        return f"engines/{variant}/{program}.engine", onnx_file(variant, program)

    def engine_device(self, device: torch.device) -> torch.device:
        """On a GPU, wherever the model was captured."""
        return device if device.type == "cuda" else torch.device("cuda")

    def lowering_facts(self, device: torch.device) -> Mapping[str, str]:
        """The library, the GPUs that are built for, and the exporter: an engine holds no weight."""
        return {**self.build_requirements(device), **exporter_facts()}

    def machine_facts(self, device: torch.device) -> Mapping[str, str]:
        """The library's version and the device's compute capability."""
        return {self.name: self.trt().__version__, "gpu": capability(device)}

    def require(self, building: bool) -> None:
        """Needs the library; building also needs the extra `onnx`."""
        self.trt()
        if building:
            require_onnx(f"runtime {self.name}")
            self.check_options()

    def lower(self, program: Program, device: torch.device, files: Sequence[Path]) -> None:
        """Export and build."""
        engine, model = files
        export_onnx(program, device, model)
        with on_device(device):
            engine.write_bytes(self.build(model, program.name, profile_of(program)))

    def link(self, files: Sequence[Path], weights: Path, prefix: str) -> None:
        """Make the weights external data of the ONNX model; the engine gets them when it is loaded."""
        link_weights(files[1], weights, prefix)

    def load(
        self, program: Program, files: Sequence[Path], weights: Mapping[str, Tensor], device: torch.device
    ) -> Engine:
        """An engine on a GPU; elsewhere one that can only be saved."""
        if device.type != "cuda":
            return UnavailableEngine(
                f"engines of runtime {self.name} run on a CUDA GPU, the model was compiled on {device}; save the"
                " artifact and load it there"
            )
        with self.logging() as logger, on_device(device):
            runtime = self.trt().Runtime(logger)
            runtime.engine_host_code_allowed = True  # version-compatible engines hold some; their hashes were checked
            engine = runtime.deserialize_cuda_engine(files[0].read_bytes())
            if engine is None:
                raise RuntimeUnavailableError(
                    f"runtime {self.name}: {program.name} cannot be loaded: {logger.reason()}"
                )
        return TensorRTEngine(program, engine, self.context_config(engine), weights, device)

    def build(self, model: Path, name: str, profile: Profile = MappingProxyType({})) -> bytes:
        """The serialised engine of an ONNX model whose weights are inputs.

        Args:
            model: an ONNX file; data outside of it are not read.
            name: of the program, for the message.
            profile: shapes of the inputs with free sizes.

        Raises:
            RuntimeUnavailableError: naming the node that the library has no counterpart for,
                by the path of its module.
        """
        with self.logging() as logger:
            builder = self.trt().Builder(logger)
            network = self.parse(builder, model, name, logger)
            config = self._config(builder, profile)
            with self.timings(config):
                plan = builder.build_serialized_network(network, config)
            if plan is None:
                raise RuntimeUnavailableError(
                    f"runtime {self.name}: {name} cannot be built: {logger.reason()}; choose another --workspace,"
                    " --dtype or --runtime"
                )
            return bytes(plan)

    def parse(self, builder: Any, model: Path, name: str, logger: Any) -> Any:
        """The network of an ONNX model; arguments and errors as of `build`."""
        trt = self.trt()
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = trt.OnnxParser(network, logger)
        if not parser.parse(runnable(model)):
            error = parser.get_error(0)
            raise RuntimeUnavailableError(
                f"runtime {self.name}: {name} cannot be built, at {error.node_name() or 'the model'}:"
                f" {' '.join(error.desc().split())}"
            )
        return network

    def trt(self) -> Any:
        """The Python module."""
        with importing(f"runtime {self.name}", f"pip install {self.name.replace('_', '-')}"):
            return importlib.import_module(self.name)

    @contextlib.contextmanager
    def logging(self) -> Iterator[Any]:
        """A logger that keeps the errors, for the one that is raised."""
        trt = self.trt()

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

    @abc.abstractmethod
    def build_requirements(self, device: torch.device) -> Mapping[str, str]:
        """The library's version and the GPUs' compute capabilities."""

    @abc.abstractmethod
    def check_options(self) -> None:
        """Raise `RuntimeUnavailableError` where nothing can be built with these options here."""

    @abc.abstractmethod
    def configure(self, config: Any) -> None:
        """Put the options that the other library does not have into a builder's settings."""

    @abc.abstractmethod
    def context_config(self, engine: Any) -> Any:
        """What execution contexts are made with: their scratch memory is ours."""

    def timings(self, config: Any) -> contextlib.AbstractContextManager[None]:
        """Around a build: keeps what was timed, where that is of use."""
        return contextlib.nullcontext()

    def _config(self, builder: Any, shapes: Profile) -> Any:
        """The builder's settings, with the shapes that free sizes may make."""
        trt = self.trt()
        config = builder.create_builder_config()
        (config.set_flag if self.tf32 else config.clear_flag)(trt.BuilderFlag.TF32)
        if self.workspace is not None:
            config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, self.workspace)
        if self.optimization_level is not None:
            config.builder_optimization_level = self.optimization_level
        self.configure(config)
        if shapes:
            profile = builder.create_optimization_profile()
            for name, sizes in shapes.items():
                profile.set_shape(name, *sizes)
            config.add_optimization_profile(profile)
        return config


def profile_of(program: Program) -> Profile:
    """Shapes of the inputs with free sizes: as small, as usual and as large as an engine serves.

    Of rows, steps and requests there are as many as one call may have, of other free sizes those of the examples.
    """
    known = {"prologue": MAX_ROWS, REQUESTS: MAX_REQUESTS}
    most = known.get(program.name) or steps_per_call(program)
    least, largest = ({symbol: bounds[at] for symbol, bounds in program.ranges.items()} for at in (0, 1))
    rows = min(EXAMPLE_ROWS, most)
    return {
        value.name: [
            value.shape_at(least, MIN_ROWS),
            [rows if size is None else size for size in value.shape],
            value.shape_at(largest, most),
        ]
        for value in program.inputs
        if value.free_at
    }


@dataclass(frozen=True, slots=True)
class TensorRT(TensorRTBase):
    """TensorRT, which builds for the GPU that it is on; None leaves its own default.

    Args:
        workspace: bytes of scratch memory that building may use.
        optimization_level: how long building looks for better kernels, 0..5.
        tf32: whether float32 products may round their factors to 10 bits.
        timing_cache: file that is read and added to, so that building again is fast.
        version_compatible: engines also run on later versions of the library.
        hardware_compatible: engines also run on other GPUs, Ampere and newer.
    """

    name: str = "tensorrt"
    workspace: int | None = None
    optimization_level: int | None = None
    tf32: bool = False
    timing_cache: Path | None = None
    version_compatible: bool = False
    hardware_compatible: bool = False

    @override
    def build_requirements(self, device: torch.device) -> Mapping[str, str]:
        gpu = "sm80+" if self.hardware_compatible else capability(device)
        return {self.name: self.trt().__version__ + "+" * self.version_compatible, "gpu": gpu}

    @override
    def check_options(self) -> None:
        if not torch.cuda.is_available():
            raise RuntimeUnavailableError(
                f"runtime {self.name}: builds on a GPU and finds none; choose runtime tensorrt_rtx, which needs none"
            )

    @override
    def configure(self, config: Any) -> None:
        trt = self.trt()
        if self.version_compatible:
            config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
        if self.hardware_compatible:
            config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS

    @override
    def context_config(self, engine: Any) -> Any:
        return self.trt().ExecutionContextAllocationStrategy.USER_MANAGED

    @contextlib.contextmanager
    def timings(self, config: Any) -> Iterator[None]:
        """Read the timing cache, and write what was added to it."""
        if self.timing_cache is None:
            yield
            return
        try:
            known = self.timing_cache.read_bytes() if self.timing_cache.exists() else b""
        except OSError as error:
            raise RuntimeUnavailableError(
                f"timing cache {self.timing_cache}: {reason_of(error)}; name a file"
            ) from error
        cache = config.create_timing_cache(known)
        if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
            raise RuntimeUnavailableError(
                f"timing cache {self.timing_cache}: damaged, or of another version or GPU; remove it, or name another"
                " file"
            )
        yield
        with writing(self.timing_cache) as partial:
            partial.write_bytes(bytes(cache.serialize()))


@dataclass(frozen=True, slots=True)
class TensorRTForRTX(TensorRTBase):
    """TensorRT for RTX, which builds without a GPU; None leaves its own default.

    Args:
        targets: compute capabilities to build for ("sm89"); by default this machine's GPU, and
            where there is none, all from Ampere on that the library knows.
        workspace, optimization_level, tf32: as of `TensorRT`.
    """

    name: str = "tensorrt_rtx"
    targets: tuple[str, ...] = ()
    workspace: int | None = None
    optimization_level: int | None = None
    tf32: bool = False

    @override
    def build_requirements(self, device: torch.device) -> Mapping[str, str]:
        gpus = self._wanted() or (capability(device),)
        return {self.name: self.trt().__version__, "gpu": " or ".join(gpus)}

    @override
    def check_options(self) -> None:
        if isinstance(self.targets, str):
            raise RuntimeUnavailableError(
                f"runtime {self.name}: targets {self.targets!r}: expected several, as ('sm89',)"
            )
        for target in self.targets:
            if target.strip().lower() not in self._known():
                raise RuntimeUnavailableError(
                    f"runtime {self.name}: target {target!r} is unknown; choose among {', '.join(self._known())}"
                )

    @override
    def require_on(self, device: torch.device) -> None:
        """A GPU that the library knows, where no other targets are named."""
        here = capability(device)
        if not self.targets and here not in ("none", *self._known()):
            raise RuntimeUnavailableError(
                f"runtime {self.name}: does not build for this GPU ({here}); it knows {', '.join(self._known())}. Name"
                " others with --target, or choose runtime tensorrt or inductor"
            )

    @override
    def configure(self, config: Any) -> None:
        trt = self.trt()
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)  # else nothing can be captured in a CUDA graph
        wanted = [target.upper() for target in self._wanted()] or ["CURRENT"]
        config.num_compute_capabilities = len(wanted)
        for at, target in enumerate(wanted):
            config.set_compute_capability(getattr(trt.ComputeCapability, target), at)

    @override
    def context_config(self, engine: Any) -> Any:
        """Contexts share the kernels that they compile, and choose them once."""
        trt = self.trt()
        config = engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        config.set_runtime_cache(config.create_runtime_cache())
        config.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
        return config

    def _known(self) -> list[str]:
        """Compute capabilities that the library can build for, the oldest first."""
        names = [name.lower() for name in self.trt().ComputeCapability.__members__ if name.startswith("SM")]
        return sorted(names, key=lambda name: int(name.removeprefix("sm")))

    def _wanted(self) -> list[str]:
        """Those that are built for; none of them: the GPU that is here."""
        if self.targets:
            return list(dict.fromkeys(target.strip().lower() for target in self.targets))
        return [] if torch.cuda.is_available() else [name for name in self._known() if name != "sm75"]


def capability(device: torch.device) -> str:
    """A GPU's compute capability as "sm89"; of no GPU, "none"."""
    if not torch.cuda.is_available():
        return "none"
    return "sm" + "".join(map(str, torch.cuda.get_device_capability(device if device.type == "cuda" else None)))
