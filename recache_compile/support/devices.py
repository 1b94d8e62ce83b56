"""Where models run."""

import contextlib
from typing import Any

import torch

from recache_compile.errors import RuntimeUnavailableError


def usable_device(name: str | torch.device | None = None) -> torch.device:
    """A device of this machine.

    Args:
        name: "cpu", "cuda" or "cuda:1"; None: a CUDA GPU where there is one, else the CPU.

    Raises:
        RuntimeUnavailableError: it is not here, or is no device that models run on.
    """
    device = parsed_device(("cuda" if torch.cuda.is_available() else "cpu") if name is None else name)
    count = torch.cuda.device_count() if device.type == "cuda" else 1
    if (device.index or 0) >= count:
        what = "there are fewer GPUs here" if count else "there is no CUDA GPU here"
        raise RuntimeUnavailableError(f"device {name}: {what}; choose another, or leave it out")
    return numbered(device)


def parsed_device(name: str | torch.device) -> torch.device:
    """A device of a kind that models run on, here or not.

    Raises:
        RuntimeUnavailableError: there is no such kind.
    """
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError):
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise RuntimeUnavailableError(f"device {name}: unknown; choose cpu, cuda or cuda:1")
    return device if device.type == "cuda" else torch.device("cpu")


def numbered(device: torch.device) -> torch.device:
    """The device as its tensors name it: "cuda" is one of several."""
    if device.type == "cuda" and device.index is None and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return device


def on_device(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """The GPU that libraries take for the current one; on the CPU there is none."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
