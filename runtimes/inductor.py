"""Ahead-of-time compilation with AOTInductor: one `.pt2` package per program, no weights inside."""

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from recache_compile.errors import RuntimeUnavailableError
from recache_compile.export import export_module, quiet
from recache_compile.program import Program
from recache_compile.runtimes.base import Engine, example_inputs, free_sizes


@dataclass(frozen=True, slots=True)
class Inductor:
    """AOTInductor on the CPU or a GPU."""

    name: str = "inductor"

    def files(self, variant: int, program: str) -> tuple[str, ...]:
        """One package a program."""
        return (f"engines/{variant}/{program}.pt2",)

    def key(self, device: torch.device) -> str | None:
        """The torch version, and the processor or GPU architecture."""
        if device.type == "cuda":
            machine = "cuda " + "".join(map(str, torch.cuda.get_device_capability(device)))
        else:
            machine = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
        return f"torch {torch.__version__} on {machine}"

    def require(self) -> None:
        """Needs a C++ compiler, on the CPU and for a GPU's launchers alike."""
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch._inductor.exc import InvalidCxxCompiler

        try:
            get_cpp_compiler()
        except InvalidCxxCompiler:
            raise RuntimeUnavailableError(
                "runtime inductor: no C++ compiler found; install g++ or clang, or choose --runtime eager"
            ) from None

    def lower(self, program: Program, device: torch.device, files: Sequence[Path]) -> None:
        """Compile; weights stay outside of the package."""
        from torch._inductor.exc import CppCompileError, InductorError

        inputs = example_inputs(program, device)
        sizes = free_sizes(program)
        exported = export_module(program.module, inputs, {}, dynamic_shapes=tuple(sizes) if any(sizes) else None)
        try:
            with quiet("torch.utils.cpp_extension"):
                torch._inductor.aoti_compile_and_package(
                    exported,
                    package_path=str(files[0]),
                    inductor_configs={
                        "aot_inductor.package_constants_in_so": False,
                        "always_keep_tensor_constants": True,  # else small weights become part of the code
                    },
                )
        except (CppCompileError, InductorError) as error:
            raise RuntimeUnavailableError(
                f"runtime inductor: the C++ compiler failed on {program.name}; choose --runtime eager, or mend the"
                f" compiler: {str(error).strip().splitlines()[-1]}"
            ) from error

    def link(self, files: Sequence[Path], weights: Path, prefix: str) -> None:
        """Packages know their weights by name."""

    def load(
        self, program: Program, files: Sequence[Path], weights: Mapping[str, Tensor], device: torch.device
    ) -> Engine:
        """Load a package and hand it pointers to the weights."""
        with quiet("torch.utils.cpp_extension"):
            compiled = torch._inductor.aoti_load_package(str(files[0]))
        own = {name: weights[name] for name in compiled.get_constant_fqns()}
        compiled.load_constants(own, check_full_update=True, user_managed=True)
        run = compiled.loader.run

        def engine(inputs: Sequence[Tensor], own: Mapping[str, Tensor] = own) -> Sequence[Tensor]:
            return run(list(inputs))  # type: ignore[no-any-return]

        return engine
