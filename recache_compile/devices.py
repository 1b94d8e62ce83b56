"""Where models run."""

import torch

from recache_compile.errors import RuntimeUnavailableError


def usable_device(name: str | torch.device | None = None) -> torch.device:
    """A device of this machine.

    Args:
        name: "cpu", "cuda" or "cuda:1"; None: a CUDA GPU where there is one, else the CPU.

    Raises:
        RuntimeUnavailableError: it is not here, or is no device that models run on.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise RuntimeUnavailableError(f"device {name}: unknown; choose cpu, cuda or cuda:1") from None
    if device.type not in ("cpu", "cuda"):
        raise RuntimeUnavailableError(f"device {name}: models run on cpu or cuda; choose one of them")
    count = torch.cuda.device_count() if device.type == "cuda" else 1
    if (device.index or 0) >= count:
        raise RuntimeUnavailableError(
            f"device {name}: there {'is no CUDA GPU' if not count else 'are fewer GPUs'} here; choose another, or leave it out"
        )
    return numbered(device)


def numbered(device: torch.device) -> torch.device:
    """The device as its tensors name it: "cuda" is one of several."""
    if device.type == "cuda" and device.index is None and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return device
