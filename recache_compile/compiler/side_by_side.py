"""Programs lowered at the same time: compilers written in Python need a process each.

A helper is told what to lower and where the files go.  It never sees a weight's value: it lowers
with memory that nobody has written to, which costs none.  What it cannot do, or whose process
dies, is lowered by the process that asked, which also says what is wrong.
"""

import contextlib
import logging
import os
import pickle
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from recache_compile.ir.program import Program
from recache_compile.ir.serialize import program_from_json, program_to_json
from recache_compile.runtimes.base import Runtime

log = logging.getLogger(__name__)

PROGRAMS = 3
"""Of a model: prologue, recompute, forecast; with `batching` one more, the recompute of several requests."""

LONGEST_SECONDS = 1800
"""For one program; a helper that takes longer is taken to hang, and is ended."""

ROOT = Path(__file__).resolve().parents[2]
"""The folder that this package is imported from."""

HELPER = "recache_compile.compiler.helper"

HERE = torch.device("cpu")
"""What helpers lower for."""


@dataclass(frozen=True, slots=True, eq=False)
class Job:
    """One program to be lowered.

    Args:
        program: to be lowered.
        files: where its engine goes.
    """

    program: Program
    files: Sequence[Path]


@dataclass(frozen=True, slots=True)
class Order:
    """What a helper is told.

    Args:
        text: the program as JSON.
        weights: type and shape of all that it reads.
        files: where its engine goes.
        threads: that torch uses in the process that asks.
        settings: of the runtime there.
        facts: what the runtime must find in the helper's process too.
    """

    text: str
    weights: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
    files: tuple[Path, ...]
    threads: int
    settings: bytes
    facts: Mapping[str, str] | None


@dataclass(slots=True)
class Helpers:
    """Processes that lower programs for the CPU, as many as torch has threads, this one among them.

    Args:
        runtime: lowers programs.
        device: to lower for.
        programs: how many a model is expected to have.
    """

    runtime: Runtime
    device: torch.device
    programs: int = PROGRAMS
    _processes: list["subprocess.Popen[bytes]"] = field(default_factory=list, init=False)

    def start(self) -> None:
        """Let them load their libraries, and let the runtime look at the machine, while there is no program yet."""
        helpers = min(torch.get_num_threads(), self.programs) - 1
        if self._processes or not helpers or not sys.executable or not self.runtime.lowers_apart(self.device):
            return
        with contextlib.suppress(OSError):  # there is no room for another process
            for _ in range(helpers):
                self._processes.append(_started(self.runtime))
        self.runtime.prepare()

    def lower(self, jobs: Sequence[Job], facts: Mapping[str, str] | None, lower_here: Callable[[Job], None]) -> None:
        """Lower all programs, the largest first, some of them here.

        Args:
            jobs: what is to be lowered.
            facts: the runtime's `lowering_facts`, which must be those of the other processes.
            lower_here: does it in this process.
        """
        if len(jobs) > 1:
            self.start()
        waiting = deque(sorted(jobs, key=lambda job: -job.program.num_calls))
        left: list[Job] = []

        def serve(process: "subprocess.Popen[bytes]") -> None:
            while (job := _next(waiting)) is not None:
                if not _ask(process, job, self.runtime, facts):
                    left.append(job)
                    return

        threads = [threading.Thread(target=serve, args=(each,), daemon=True) for each in self._processes]
        job = _next(waiting)  # the largest one does not wait for a helper that is still loading libraries
        for thread in threads:
            thread.start()
        while job is not None:
            lower_here(job)
            job = _next(waiting)
        for thread in threads:
            thread.join()
        for job in left:
            log.info("%s was not lowered by a process of its own; once more in this one", job.program.name)
            lower_here(job)

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            _end(process)
        self._processes.clear()


def _next(waiting: deque[Job]) -> Job | None:
    with contextlib.suppress(IndexError):
        return waiting.popleft()
    return None


def _started(runtime: Runtime) -> "subprocess.Popen[bytes]":
    """A helper, which imports what this process can import, but nothing from the folder that the user is in."""
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", HELPER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(_places())},
    )
    try:
        _send(process, runtime)
    except BaseException:
        _end(process)
        raise
    return process


def _places() -> list[str]:
    """Where a helper looks for modules; in the folder that the user is in only where that is this package's own."""
    here = Path.cwd()
    return [place or str(here) for place in sys.path if here == ROOT or Path(place).resolve() != here]


def _end(process: "subprocess.Popen[bytes]") -> None:
    process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout):
        assert stream is not None
        with contextlib.suppress(OSError):
            stream.close()


def _send(process: "subprocess.Popen[bytes]", what: Runtime | Order) -> None:
    assert process.stdin is not None
    pickle.dump(what, process.stdin)
    process.stdin.flush()


def _order(job: Job, runtime: Runtime, facts: Mapping[str, str] | None) -> Order:
    weights = {name: (weight.dtype, tuple(weight.shape)) for name, weight in job.program.weights.items()}
    text = program_to_json(job.program)
    return Order(text, weights, tuple(job.files), torch.get_num_threads(), runtime.settings(), facts)


def _ask(process: "subprocess.Popen[bytes]", job: Job, runtime: Runtime, facts: Mapping[str, str] | None) -> bool:
    """Whether a helper has lowered a program; one that hangs is ended."""
    assert process.stdout is not None
    limit = threading.Timer(LONGEST_SECONDS, process.kill)
    limit.daemon = True
    limit.start()
    try:
        _send(process, _order(job, runtime, facts))
        answer = process.stdout.read(1)
    except Exception as error:  # noqa: BLE001  # it has died, or what this process has set cannot be sent
        log.debug("no other process can lower %s: %s", job.program.name, error)
        return False
    finally:
        limit.cancel()
    return answer == b"1"


def _follow(order: Order, runtime: Runtime) -> bool:
    """Lower a program in a helper; False where this process differs from the one that asked."""
    torch.set_num_threads(order.threads)
    runtime.adopt(order.settings)
    if runtime.lowering_facts(HERE) != order.facts:
        return False
    weights = {name: torch.empty(shape, dtype=dtype) for name, (dtype, shape) in order.weights.items()}
    runtime.lower(program_from_json(order.text, weights, HERE), HERE, order.files)
    return True


def serve() -> None:
    """The helper's loop, until the process that started it closes the pipe or is gone."""
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # compilers may print
    with contextlib.suppress(EOFError, KeyboardInterrupt, BrokenPipeError), torch.no_grad():
        runtime: Runtime = pickle.load(sys.stdin.buffer)  # from the process that started this one, as all of them
        runtime.prepare()
        while True:
            order: Order = pickle.load(sys.stdin.buffer)
            done = False
            with contextlib.suppress(Exception):  # the other process meets it too, and tells
                done = _follow(order, runtime)
            answers.write(b"1" if done else b"0")
