"""Where something was measured."""

import functools
import hashlib
import os
import platform
import subprocess
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from recache_compile._version import __version__

PACKAGES = (
    *("torch", "triton", "diffusers", "transformers", "onnxruntime", "tensorrt-rtx", "cache-dit"),
    *("numpy", "torchmetrics", "lpips", "open_clip_torch", "torch-fidelity", "vbench"),
)

COMPILERS = ("TORCHINDUCTOR_", "AOT_INDUCTOR_", "CXX", "CC")
"""Variables of the environment that change what compilers make begin with these."""

EXTENSIONS = ("sse4", "avx", "fma", "f16c", "bmi2", "vaes", "vpclmulqdq", "gfni", "amx")
"""What the names of the instruction sets begin with that compilers and Linux call alike."""


def machine(device: str, threads: int = 0) -> str:
    """The GPU's name, or the processor's with the number of threads used; 0: those of this process."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"{_of_processor('model name') or platform.machine()}, {threads or torch.get_num_threads()} threads"


def instruction_sets() -> frozenset[str]:
    """Extensions of the instruction set of x86-64 that this processor has, as "avx512vnni"."""
    return _extensions(_of_processor("flags").split())


def compiled_instruction_sets(compiler: str, march: str) -> frozenset[str]:
    """Extensions that a C++ compiler uses.

    Args:
        compiler: its command.
        march: what it compiles for, "native" for this machine.
    """
    command = [compiler, f"-march={march}", "-E", "-dM", "-x", "c++", "/dev/null"]
    asked = subprocess.run(command, capture_output=True, text=True, check=False)
    return _extensions(line.split()[1] for line in asked.stdout.splitlines() if len(line.split()) > 1)


def _extensions(names: Iterable[str]) -> frozenset[str]:
    """Those among names of macros or of flags of a processor that vector code is made of, spelled alike."""
    plain = (name.strip("_").replace("_", "").lower() for name in names)
    return frozenset(name for name in plain if name.startswith(EXTENSIONS))


def _of_processor(fact: str) -> str:
    """What Linux tells of the first core; "" elsewhere."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(fact)), "")


def versions() -> dict[str, str]:
    """Of what takes part."""
    return dict(_versions())


@functools.cache
def _versions() -> Mapping[str, str]:
    found = {"recache-compile": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def compiling_facts() -> dict[str, object]:
    """What else than a model and its choices decides about what compilers make."""
    variables = {name: value for name, value in os.environ.items() if name.startswith(COMPILERS)}
    return {"versions": versions(), "sources": _hash_of_sources(), "compilers": variables}


@functools.cache
def _hash_of_sources() -> str:
    """Of the files of this package, which may be one that is worked on."""
    root = Path(__file__).parents[1]
    places = os.walk(root, followlinks=True)  # in a checkout, three of its folders are links
    files = sorted(Path(place, name) for place, _, names in places for name in names if name.endswith(".py"))
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()
