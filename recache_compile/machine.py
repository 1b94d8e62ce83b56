"""Where something was measured."""

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch


def machine(device: str) -> str:
    """The GPU's name, or the processor's with the number of threads used."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    file = Path("/proc/cpuinfo")
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {torch.get_num_threads()} threads"


def versions() -> dict[str, str]:
    """Of what takes part."""
    found = {"python": platform.python_version()}
    for package in ("torch", "diffusers", "cache-dit", "onnxruntime", "tensorrt-rtx", "recache-compile"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
