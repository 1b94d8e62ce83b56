"""Where something was measured."""

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from recache_compile._version import __version__

PACKAGES = (
    *("torch", "diffusers", "transformers", "onnxruntime", "tensorrt-rtx", "cache-dit"),
    *("numpy", "torchmetrics", "lpips", "open_clip_torch", "torch-fidelity", "vbench"),
)


def machine(device: str, threads: int = 0) -> str:
    """The GPU's name, or the processor's with the number of threads used; 0: those of this process."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"{_of_processor('model name') or platform.machine()}, {threads or torch.get_num_threads()} threads"


def processor_flags() -> str:
    """The instructions that this processor has: code that was compiled for them may not run on another one."""
    return _of_processor("flags")


def _of_processor(fact: str) -> str:
    """What Linux tells of the first core; "" elsewhere."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(fact)), "")


def versions() -> dict[str, str]:
    """Of what takes part."""
    found = {"recache-compile": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
