"""Find a runtime by name."""

from collections.abc import Callable

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


RUNTIMES: dict[str, Callable[[], Runtime]] = {"eager": _eager, "inductor": _inductor, "onnxruntime": _onnxruntime}


def get_runtime(name: str, explain: Callable[[str], None] = lambda message: None) -> Runtime:
    """A usable runtime.

    Args:
        name: one of `RUNTIMES`, or "auto": the first that can be used of inductor, onnxruntime and eager.
        explain: told why "auto" did not take inductor.

    Raises:
        RuntimeUnavailableError: unknown, or not usable on this machine.
    """
    if name == "auto":
        reasons: list[RuntimeUnavailableError] = []
        for each in ("inductor", "onnxruntime"):
            try:
                runtime = get_runtime(each)
                break
            except RuntimeUnavailableError as error:
                reasons.append(error)
        else:
            runtime = get_runtime("eager")
        if reasons:
            explain(f"{reasons[0]}; using runtime {runtime.name}")
        return runtime
    if name not in RUNTIMES:
        raise RuntimeUnavailableError(f"runtime {name!r} is unknown; choose auto, {', '.join(RUNTIMES)}")
    runtime = RUNTIMES[name]()
    runtime.require()
    return runtime
