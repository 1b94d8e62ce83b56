"""The one error tree of the package: each message says what, where and the remedy."""

import contextlib
import re
from collections.abc import Iterator

_NO_MEMORY = re.compile(r"out of memory|can't allocate memory|CUBLAS_STATUS_ALLOC_FAILED")


class RecacheError(Exception):
    """Something that the user can put right."""


class ScheduleError(RecacheError):
    """A schedule, a budget or a policy's answer is not usable."""


class CaptureError(RecacheError):
    """A module cannot be captured, or an input has no role."""


class PassError(RecacheError):
    """A pass cannot do its work on this graph."""


class ModelError(RecacheError):
    """A model or pipeline cannot be loaded or driven."""


class RuntimeUnavailableError(RecacheError):
    """A runtime or an optional dependency is not usable on this machine."""


class DispatchError(RecacheError):
    """A call does not fit what was compiled."""


class MismatchError(DispatchError):
    """A call whose shapes, types or constants are not among those compiled."""


class ArtifactError(RecacheError):
    """An artifact is damaged, from a newer version, or cannot be written."""


@contextlib.contextmanager
def importing(who: str, install: str) -> Iterator[None]:
    """One line for a package that is missing or does not fit what is installed beside it."""
    try:
        yield
    except (ImportError, OSError) as error:  # OSError: a native library that cannot be loaded
        raise RuntimeUnavailableError(f"{who}: {reason_of(error)}; {install}") from error


def check_memory(error: BaseException) -> None:
    """Raise `RuntimeUnavailableError` where memory ran out, which is no fault of what was being done."""
    where: BaseException | None = error
    while where is not None:
        # by their words, as `torch` has several classes, and on the CPU a plain RuntimeError
        if isinstance(where, MemoryError) or (isinstance(where, RuntimeError) and _NO_MEMORY.search(str(where))):
            raise RuntimeUnavailableError(
                f"out of memory: {reason_of(where)}; take a smaller size or batch, half precision, or another device"
            ) from error
        where = where.__cause__ or (None if where.__suppress_context__ else where.__context__)


def root_cause(error: BaseException) -> str:
    """What the first error of a chain says, on one line: wrappers tell where, it tells why."""
    while (before := error.__cause__ or error.__context__) is not None:
        error = before
    return f"{type(error).__name__}: {reason_of(error)}"


def first_line(error: BaseException) -> str:
    """What an error says before it goes on (torch prints whole graphs); its type where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def reason_of(error: BaseException) -> str:
    """What another library's error says, on one line."""
    return " ".join(str(error).split())[:200].rstrip(".") or type(error).__name__
