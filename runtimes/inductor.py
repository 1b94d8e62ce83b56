"""Ahead-of-time compilation with AOTInductor: one `.pt2` package per program, no weights inside."""

import contextlib
import copy
import platform
import re
import threading
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from subprocess import CalledProcessError

import torch
from torch import Tensor, fx, nn

from recache_compile.capture.export import export_module, quiet
from recache_compile.errors import RuntimeUnavailableError, check_memory
from recache_compile.ir.program import Program
from recache_compile.passes.base import Pass, run_passes, with_values
from recache_compile.passes.lay_out_attention import LayOutAttention
from recache_compile.passes.split_bias import SplitBias
from recache_compile.passes.write_out_gelu import WriteOutGelu
from recache_compile.runtimes.base import Engine, Runtime, check_free, dynamic_shapes, example_inputs
from recache_compile.support.machine import compiled_instruction_sets, instruction_sets

CPU_PASSES: tuple[Pass, ...] = (WriteOutGelu(), SplitBias(), LayOutAttention())
"""What the compiler for CPUs does not do by itself, and what would not be right for others."""

ATTENTION = ("flash", "mem_efficient", "math", "cudnn")
"""Kernels of attention that can be switched off, on CPUs by the same switches."""


class InductorEngine(Engine):
    """A package that was loaded.

    On a GPU it runs without AOTInductor's own bookkeeping of concurrent calls, whose events
    cannot be part of a CUDA graph; calls from several threads are then launched one by one.
    """

    def __init__(self, file: Path, weights: Mapping[str, Tensor], device: torch.device) -> None:
        on_gpu = device.type == "cuda"
        index = -1 if device.index is None else device.index
        with quiet("torch.utils.cpp_extension"):
            self._package = torch._inductor.aoti_load_package(str(file), run_single_threaded=on_gpu, device_index=index)
        self._run = self._package.loader.run
        self._launching = threading.Lock() if on_gpu else contextlib.nullcontext()
        self.use(weights)

    def __call__(self, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        """One call of the package."""
        with self._launching:
            results = self._run(list(inputs))
        return [result.contiguous() for result in results]

    def use(self, weights: Mapping[str, Tensor]) -> None:
        """Hand over pointers, and keep what they point to."""
        self._weights = {name: weights[name] for name in self._package.get_constant_fqns()}
        self._package.load_constants(self._weights, check_full_update=True, user_managed=True)


@dataclass(frozen=True, slots=True)
class Inductor(Runtime):
    """AOTInductor on the CPU or a GPU."""

    name: str = "inductor"
    capturable = True

    def files(self, variant: int, program: str) -> tuple[str, ...]:
        """One package a program."""
        return (f"engines/{variant}/{program}.pt2",)

    def build_requirements(self, device: torch.device) -> Mapping[str, str]:
        """The torch version, and the GPU's architecture or the processor's with the instructions that are used."""
        from torch._inductor.cpp_builder import get_cpp_compiler

        facts = _facts(device)
        if device.type == "cpu":
            march = getattr(torch._inductor.config.cpp, "march", None) or "native"
            facts |= _needing(compiled_instruction_sets(get_cpp_compiler(), march))
        return facts

    def machine_facts(self, device: torch.device) -> Mapping[str, str]:
        """The same of this machine, whose processor may know more instructions."""
        return _facts(device) | (_needing(instruction_sets()) if device.type == "cpu" else {})

    def lowering_facts(self, device: torch.device) -> Mapping[str, str]:
        """The same, with the compiler, its settings and the threads that kernels are divided among."""
        from torch._inductor.cpp_builder import get_compiler_version_info, get_cpp_compiler

        own = torch._inductor.config.save_config_portable()  # type: ignore[attr-defined]
        own.pop("aot_inductor.metadata", None)  # it writes there itself
        settings = {
            "inductor": sorted(own.items()),
            "precision": torch.get_float32_matmul_precision(),
            "deterministic": torch.are_deterministic_algorithms_enabled(),
            "onednn": torch.backends.mkldnn.enabled,
            "attention": [getattr(torch.backends.cuda, f"{kernel}_sdp_enabled")() for kernel in ATTENTION],
        }
        return {
            **self.build_requirements(device),
            "compiler": get_compiler_version_info(get_cpp_compiler()),
            "threads": str(torch.get_num_threads()),
            "settings": repr(sorted(settings.items())),
        }

    def lowers_apart(self, device: torch.device) -> bool:
        """On the CPU; another process would need memory of a GPU for itself."""
        return device.type == "cpu"

    def settings(self) -> bytes:
        """The compiler's own."""
        return torch._inductor.config.save_config()  # type: ignore[attr-defined]

    def adopt(self, settings: bytes) -> None:
        """The compiler's own."""
        torch._inductor.config.load_config(settings)  # type: ignore[attr-defined]

    def prepare(self) -> None:
        """Which vector instructions can be used is found out meanwhile: torch builds a library for each kind."""
        from torch._inductor.cpu_vec_isa import pick_vec_isa

        def look() -> None:
            with quiet("torch.utils.cpp_extension"), contextlib.suppress(Exception):  # lowering says so, too
                pick_vec_isa()

        threading.Thread(target=look, daemon=True).start()

    def require(self, building: bool) -> None:
        """Building needs a C++ compiler, on the CPU and for a GPU's launchers alike."""
        if not building:
            return
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch._inductor.exc import InvalidCxxCompiler

        try:
            get_cpp_compiler()
        except InvalidCxxCompiler:
            raise RuntimeUnavailableError(
                "runtime inductor: no C++ compiler found; install g++ or clang, or choose --runtime eager"
            ) from None

    def require_on(self, device: torch.device) -> None:
        """Kernels for a GPU are built by Triton."""
        if device.type == "cuda" and find_spec("triton") is None:
            raise RuntimeUnavailableError(
                "runtime inductor: the package triton, which builds kernels for a GPU, is missing; pip install triton,"
                " or choose --runtime eager"
            )

    def lower(self, program: Program, device: torch.device, files: Sequence[Path]) -> None:
        """Compile; weights stay outside of the package."""
        from torch._inductor.exc import CppCompileError, InductorError

        configs = {
            "aot_inductor.package_constants_in_so": False,
            "always_keep_tensor_constants": True,  # else small weights become part of the code
        }
        if hasattr(torch._inductor.config.aot_inductor, "enable_line_tables"):
            configs["aot_inductor.enable_line_tables"] = False  # they are two thirds of a package
        inputs = example_inputs(program, device)
        sizes = dynamic_shapes(program)
        if device.type == "cpu":
            program = run_passes(with_values(program, inputs), CPU_PASSES)
        module = with_parameters(program)
        exported = export_module(module, inputs, {}, dynamic_shapes=tuple(sizes) if any(sizes) else None)
        check_free(program, exported)
        try:
            with quiet("torch.utils.cpp_extension"):
                torch._inductor.aoti_compile_and_package(
                    exported,
                    package_path=str(files[0]),
                    inductor_configs=configs,
                )
        except (CppCompileError, InductorError, CalledProcessError) as error:
            check_memory(error)
            raise RuntimeUnavailableError(
                f"runtime inductor: the compiler failed on {program.name}; choose --runtime eager, or repair it:"
                f" {first_complaint(error)}"
            ) from error

    def load(
        self, program: Program, files: Sequence[Path], weights: Mapping[str, Tensor], device: torch.device
    ) -> Engine:
        """Load a package and hand it pointers to the weights."""
        return InductorEngine(files[0], weights, device)


def with_parameters(program: Program) -> fx.GraphModule:
    """A program's module with its weights as parameters, where they lie: of buffers the compiler keeps a copy."""
    weights = {name: nn.Parameter(weight, requires_grad=False) for name, weight in program.weights.items()}
    return fx.GraphModule(weights, copy.deepcopy(program.module.graph))


def _facts(device: torch.device) -> dict[str, str]:
    if device.type == "cuda":
        machine = "cuda " + "".join(map(str, torch.cuda.get_device_capability(device)))
    else:
        machine = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    return {"torch": str(torch.__version__), "machine": machine}


def _needing(instructions: Collection[str]) -> dict[str, str]:
    return {"instructions": " and ".join(sorted(instructions))} if instructions else {}


def first_complaint(error: BaseException) -> str:
    """The first line with an error in what a compiler has printed; its last line where there is none."""
    output = getattr(error, "output", None) or getattr(error, "stderr", None) or ""
    text = f"{error}\n{output.decode(errors='replace') if isinstance(output, bytes) else output}"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return next((line for line in lines if re.search(r"\b(fatal )?error:", line)), lines[-1])
