"""Runs each subject in a process of its own, so that compilations, counters and memory are not mixed."""

import contextlib
import ctypes
import gc
import io
import resource
import time
import traceback
from collections.abc import Iterator, Mapping
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from recache_compile.bench.subjects import SUBJECTS, Ours, Subject
from recache_compile.bench.workload import BenchRequest, make_workload
from recache_compile.errors import ModelError, RecacheError, reason_of
from recache_compile.evaluation.measure import seconds
from recache_compile.ir.schedule import Schedule

LONE_CALLS = 5
"""Calls of a lone engine in each round."""


class Process:
    """A subject in a child process, which runs one generation whenever `ask` says so.

    Args:
        name: of the subject.
        request: what is measured.
        schedule: the steps that are recomputed.
    """

    def __init__(self, name: str, request: BenchRequest, schedule: Schedule) -> None:
        self.name = name
        context = get_context("spawn")
        self._pipe, other_end = context.Pipe()
        self._process = context.Process(target=_serve, args=(other_end, name, request, schedule), daemon=True)
        self._process.start()
        other_end.close()

    def ask(self, what: str) -> Mapping[str, Any]:
        """The answer to "prepare", "generation" or "facts".

        Raises:
            ModelError: the subject failed, or its process died.
        """
        try:
            self._pipe.send(what)
            answer: Mapping[str, Any] = self._pipe.recv()
        except (EOFError, OSError):
            raise ModelError(f"{self.name}: its process died; there may be too little memory for it") from None
        if "error" in answer:
            raise ModelError(f"{self.name}: {answer['error']}")
        return answer

    def close(self) -> None:
        """End the process."""
        self._pipe.close()
        self._process.join(timeout=10)
        if self._process.is_alive():
            self._process.kill()


def _serve(pipe: Connection, name: str, request: BenchRequest, schedule: Schedule) -> None:
    """The child's loop: answers until the parent closes the pipe."""
    if request.threads:
        torch.set_num_threads(request.threads)
    child = _Child(name, request, schedule)
    with torch.no_grad(), contextlib.suppress(EOFError, KeyboardInterrupt):
        while True:
            what = pipe.recv()
            try:
                with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                    answer = child.answer(what)
            except RecacheError as error:
                answer = {"error": str(error)}
            pipe.send(answer)


class _Child:
    """What a child process knows; arguments as of `Process`."""

    def __init__(self, name: str, request: BenchRequest, schedule: Schedule) -> None:
        self._name, self._request, self._schedule = name, request, schedule
        self._subject: Subject | None = None
        self._start = 0

    def answer(self, what: str) -> dict[str, Any]:
        """Do what was asked; an error of any kind becomes a `ModelError` of one line."""
        try:
            if what == "prepare":
                return self._prepare()
            assert self._subject is not None
            if what == "generation":
                return _generation(self._subject, self._request)
            return _facts(self._subject, self._request, self._start)
        except RecacheError:
            raise
        except Exception as error:  # whatever a peer raises
            where = traceback.extract_tb(error.__traceback__)[-1]
            place = f"{where.filename.rpartition('/')[2]}:{where.lineno}"
            raise ModelError(f"{type(error).__name__}: {reason_of(error)} ({place})") from error

    def _prepare(self) -> dict[str, Any]:
        workload = make_workload(self._request)
        self._start = held(self._request.config.device)
        begin = time.perf_counter()
        self._subject = SUBJECTS[self._name](workload, self._request, self._schedule)
        return {"prepare_seconds": time.perf_counter() - begin}


def _generation(subject: Subject, request: BenchRequest) -> dict[str, Any]:
    """Seconds of every step; of recache-compile also of its engines, called alone."""
    seconds(subject.begin)
    with _no_collection():
        steps = [seconds(partial(subject.step, step)) for step in range(request.num_steps)]
        alone: dict[str, list[float]] = {}
        if isinstance(subject, Ours):
            alone = {name: [seconds(call) for _ in range(LONE_CALLS)] for name, call in subject.alone.items()}
    return {"steps": steps, "alone": alone}


def _facts(subject: Subject, request: BenchRequest, start: int) -> dict[str, Any]:
    """What was counted over all generations."""
    from torch._dynamo.utils import counters, get_compilation_metrics

    recompiled = [each for each in get_compilation_metrics() if getattr(each, "recompile_reason", None)]
    return {
        "graphs": int(counters["stats"].get("unique_graphs", 0)),
        "graph_breaks": int(sum(counters["graph_break"].values())),
        "recompiles": len(recompiled),
        "held_bytes": held(request.config.device) - start,
        "peak_bytes": peak(request.config.device),
        **subject.facts(),
    }


def held(device: str) -> int:
    """Memory that this process holds now: on the device, or resident on the host, in bytes."""
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(device)
        return total - free
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
    return int(pages) * resource.getpagesize()


def peak(device: str) -> int:
    """The most memory that this process held: on the device, or resident on the host, in bytes."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_reserved(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Keep Python's garbage collector from running in the middle of a step."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
