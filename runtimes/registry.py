"""Find a runtime by name."""

from collections.abc import Callable

import torch

from recache_compile.errors import RuntimeUnavailableError
from recache_compile.runtimes.base import Runtime


def _eager() -> Runtime:
    from recache_compile.runtimes.eager import Eager

    return Eager()


def _inductor() -> Runtime:
    from recache_compile.runtimes.inductor import Inductor

    return Inductor()


def _onnxruntime() -> Runtime:
    from recache_compile.runtimes.onnxruntime import OnnxRuntime

    return OnnxRuntime()


def _tensorrt() -> Runtime:
    from recache_compile.runtimes.tensorrt import TensorRT

    return TensorRT()


def _tensorrt_rtx() -> Runtime:
    from recache_compile.runtimes.tensorrt import TensorRTForRTX

    return TensorRTForRTX()


RUNTIMES: dict[str, Callable[[], Runtime]] = {
    "eager": _eager,
    "inductor": _inductor,
    "onnxruntime": _onnxruntime,
    "tensorrt": _tensorrt,
    "tensorrt_rtx": _tensorrt_rtx,
}


def known_runtime(name: str) -> Runtime:
    """A runtime, usable here or not; "tensorrt-rtx" is taken for "tensorrt_rtx".

    Raises:
        RuntimeUnavailableError: there is none of this name.
    """
    make = RUNTIMES.get(name.replace("-", "_"))
    if make is None:
        raise RuntimeUnavailableError(f"runtime {name!r} is unknown; choose auto, {', '.join(RUNTIMES)}")
    return make()


def get_runtime(
    runtime: str | Runtime,
    explain: Callable[[str], None] = lambda message: None,
    building: bool = True,
    device: torch.device | None = None,
) -> Runtime:
    """A usable runtime.

    Args:
        runtime: one of `RUNTIMES`, or "auto": the first that can be used of inductor,
            onnxruntime and eager.  A runtime with options of its own is taken as it is.
        explain: told why "auto" did not take inductor.
        building: whether it has to build engines, or only to run them.
        device: where the model is, as far as it is known.

    Raises:
        RuntimeUnavailableError: unknown, or not usable on this machine.
    """
    if runtime == "auto":
        return _first_usable(explain, device)
    chosen = known_runtime(runtime) if isinstance(runtime, str) else runtime
    chosen.require(building)
    if building and device is not None:
        chosen.require_on(device)
    return chosen


def runtime_on(runtime: str, device: torch.device, explain: Callable[[str], None] = lambda message: None) -> Runtime:
    """A runtime that builds engines here and runs them on a device of this machine.

    Args:
        runtime, explain: as of `get_runtime`.
        device: where they shall run.

    Raises:
        RuntimeUnavailableError: it does not.
    """
    chosen = get_runtime(runtime, explain, device=device)
    if chosen.engine_device(device).type != device.type:
        raise RuntimeUnavailableError(
            f"runtime {chosen.name}: its engines do not run on {device}; choose inductor, onnxruntime or eager"
        )
    return chosen


def _first_usable(explain: Callable[[str], None], device: torch.device | None) -> Runtime:
    reasons: list[RuntimeUnavailableError] = []
    for name in ("inductor", "onnxruntime"):
        try:
            runtime = get_runtime(name, device=device)
            break
        except RuntimeUnavailableError as error:
            reasons.append(error)
    else:
        runtime = get_runtime("eager")
    if reasons:
        explain(f"{reasons[0]}; using runtime {runtime.name}")
    return runtime
