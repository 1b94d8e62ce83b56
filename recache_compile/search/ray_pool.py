"""Generations of a study on many processes or machines, with Ray."""

import contextlib
import functools
import itertools
import logging
import math
import os
import socket
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import torch

from recache_compile.errors import ArtifactError, RecacheError, RuntimeUnavailableError, first_line
from recache_compile.search.objective import TaskLosses
from recache_compile.search.runner import StudyRunner
from recache_compile.search.study import Task

CHUNKS_PER_WORKER = 4
"""So many there are at least, so that no worker is the last one for long."""
LONGEST_CHUNK = 8
"""Tasks that are done again, at most, when a worker is lost."""
RETRIES = 10
"""So often a chunk is run again whose worker was lost; one that kills them all is to blame itself."""
KNOCK_SECONDS = 10
"""So long an address may take to answer."""
OBJECT_STORE = 100 * 2**20
"""Bytes of shared memory that a local cluster reserves; only numbers travel."""


def chunks(tasks: Iterable[Task], workers: int) -> Iterator[tuple[Task, ...]]:
    """Cut tasks into pieces for the workers: sorted, each of one batch, whose tasks share their first steps."""
    ordered = sorted(tasks)
    size = max(1, min(LONGEST_CHUNK, len(ordered) // (CHUNKS_PER_WORKER * workers)))
    for _, group in itertools.groupby(ordered, key=lambda task: task[0]):
        of_batch = tuple(group)
        yield from (of_batch[at : at + size] for at in range(0, len(of_batch), size))


def gpu_share(gpus: int, workers: int) -> float:
    """The part of one GPU that each worker gets; rounded down, Ray counts in parts of 10,000."""
    return 10_000 // math.ceil(workers / gpus) / 10_000 if gpus else 0


class TaskRunner(Protocol):
    """Where the work is done: a model with engines, loaded once."""

    def run(self, piece: tuple[Any, ...]) -> Iterable[Any]:
        """The results of a piece of work."""
        ...


class Worker:
    """What one process does; Ray makes and replaces it.

    Args:
        folder: what is worked on.
        threads: of torch, as many as the driver has: sums in another order have other bits.
        place: makes what does the work, from the folder.
    """

    def __init__(self, folder: Path, threads: int, place: Callable[[Path], TaskRunner]) -> None:
        torch.set_num_threads(threads)
        self._folder, self._place = folder, place

    @functools.cached_property
    def _task_runner(self) -> TaskRunner:
        """Loaded by the first call, not by the constructor: Ray hands on a call's errors as they are."""
        if not self._folder.is_dir():
            raise ArtifactError(
                f"{self._folder}: the worker on {socket.gethostname()} cannot read it; keep it on a file system that"
                " all machines of the cluster share"
            )
        return self._place(self._folder)

    def run(self, piece: tuple[Any, ...]) -> list[Any]:
        """The results of a piece of work; without any, the model is loaded at least."""
        return list(self._task_runner.run(piece))


class RayPool:
    """Ray workers, each with a model of its own, to which pieces of work are dealt out.

    A worker that is killed is replaced, and what it was doing is done again; its errors are raised
    here.  Use it as a context manager, or close it; until then stdout goes to stderr, where what Ray
    has to say of lost workers belongs.

    Args:
        folder: what is worked on; where the cluster has several machines, on a file system that they all share.
        workers: number of processes; GPUs are divided among them where the driver has one.
        address: of a running cluster, as in `ray.init`; None starts one on this machine, unless this process is
            connected to one already.
        place: makes what does the work, from the folder, in each worker.

    Raises:
        RuntimeUnavailableError: ray is not installed, or there is no cluster at the address.
    """

    def __init__(self, folder: Path, workers: int, address: str | None, place: Callable[[Path], TaskRunner]) -> None:
        self._ray, self._place = import_ray(), place
        with contextlib.ExitStack() as stack:
            stack.enter_context(contextlib.redirect_stdout(sys.stderr))
            if not self._ray.is_initialized():
                _connect(self._ray, workers, address)
                stack.callback(self._ray.shutdown)
            self._actors = self._start(folder.absolute(), workers)
            for actor in self._actors:
                stack.callback(self._ray.kill, actor)
            self._stack = stack.pop_all()

    def _start(self, folder: Path, workers: int) -> list[Any]:
        """The workers, which Ray replaces as often as needed."""
        gpus = int(self._ray.cluster_resources().get("GPU", 0)) if torch.cuda.is_available() else 0
        needs = {"num_cpus": 1, "num_gpus": gpu_share(gpus, workers)}
        actor = self._ray.remote(**needs, max_restarts=-1, max_task_retries=RETRIES)(Worker)
        return [actor.remote(folder, torch.get_num_threads(), self._place) for _ in range(workers)]

    def work(self, pieces: Iterable[tuple[Any, ...]]) -> Iterator[Any]:
        """The results of all pieces, as they arrive.

        Raises:
            RecacheError: that of a worker.
        """
        waiting = deque(pieces)
        left = len(waiting)
        calls = {actor.run.remote(()): (actor, False) for actor in self._actors}  # work goes to those that are up
        while left:
            (done,), _ = self._ray.wait(list(calls), num_returns=1)
            (actor, is_piece), results = calls.pop(done), self._get(done)
            if waiting:
                calls[actor.run.remote(waiting.popleft())] = actor, True
            left -= is_piece
            yield from results

    def _get(self, call: Any) -> list[Any]:
        """The answer of a worker, or its error."""
        try:
            return self._ray.get(call)  # type: ignore[no-any-return]
        except self._ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, RecacheError):
                raise error.cause from None
            raise
        except self._ray.exceptions.RayActorError as error:
            raise RuntimeUnavailableError(
                f"workers: Ray cannot start one, or has lost too many ({first_line(error)}); take fewer if memory is"
                " short, and install the same recache-compile on every machine of the cluster"
            ) from error

    def close(self) -> None:
        """End the workers, and the cluster or the connection if it was made here."""
        self._stack.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class RayRunner(RayPool):
    """`objective.Runner` on Ray workers; losses have the same bits as without.

    The driver prepares everything before: the samples of all batches (`StudyRunner.prepare`) and, for a fitted
    forecaster, the calibration.  Workers only read the folder.

    Args:
        folder: of the study.
        workers, address: as of `RayPool`.
    """

    def __init__(self, folder: Path, workers: int, address: str | None = None) -> None:
        super().__init__(folder, workers, address, StudyRunner)
        self._workers = workers

    def run(self, tasks: Iterable[Task]) -> Iterator[TaskLosses]:
        """Distances and rewards of every task, as they arrive.

        Raises:
            RecacheError: that of a worker.
        """
        return self.work(chunks(tasks, self._workers))


def import_ray() -> Any:
    """The optional package.

    Raises:
        RuntimeUnavailableError: it is not installed.
    """
    try:
        import ray
    except ImportError:
        raise RuntimeUnavailableError("workers: need ray; pip install 'recache-compile[ray]'") from None
    return ray


def _connect(ray: Any, workers: int, address: str | None) -> None:
    """Join a running cluster, or start one with room for the workers, however few cores there are."""
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address is None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # no statistics to Ray's developers
        ray.init("local", num_cpus=workers, include_dashboard=False, object_store_memory=OBJECT_STORE, **quiet)
        return
    try:
        _knock(address)
        ray.init(address, **quiet)
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        raise RuntimeUnavailableError(
            f"workers: no Ray cluster can be joined at {address} ({first_line(error)}); start one with `ray start"
            " --head`, or give no address to use this machine"
        ) from error


def _knock(address: str) -> None:
    """Raise `OSError` where nothing listens: Ray would try for a quarter of an hour."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if port.isdecimal():
        socket.create_connection((host, int(port)), timeout=KNOCK_SECONDS).close()
