"""Rollouts on Ray: the same losses to the last bit, whatever happens to the workers."""

import os
import shutil
import signal
import socket
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from recache_compile.config import CompileConfig
from recache_compile.errors import ArtifactError, RuntimeUnavailableError
from recache_compile.ir.schedule import Schedule
from recache_compile.search import ray_pool as workers
from recache_compile.search.objective import Losses, TaskLosses
from recache_compile.search.ray_pool import RayRunner, chunks, gpu_share
from recache_compile.search.runner import StudyRunner, build_study_engines
from recache_compile.search.study import Study, Task, write_study

STUDY = Study(
    model="shapes",
    config=CompileConfig(num_steps=6, anchors=2, granularity="stack", runtime="eager"),
    forecaster="taylor",
    distance="features",
    reward="caption",
    training_prompts=("a red circle left of a blue square on a dark background",),
    held_out_prompts=("a green triangle above a red square on a light background",),
    batch_size=2,
)
MASKS = tuple(f"1{number:05b}" for number in range(12))
TASKS = tuple((batch, mask) for batch in (0, 1) for mask in MASKS)


@pytest.fixture
def ray() -> Any:
    return pytest.importorskip("ray")


@pytest.fixture(scope="session")
def study(shapes: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study whose batches 0 and 1 are prepared."""
    folder = tmp_path_factory.mktemp("studies") / "shapes"
    write_study(STUDY, folder)
    build_study_engines(STUDY, folder, shapes)
    StudyRunner(folder, shapes).prepare((0, 1))
    return folder


@pytest.fixture(scope="session")
def rows(study: Path, shapes: Any) -> list[TaskLosses]:
    """What this process finds out."""
    return list(StudyRunner(study, shapes).run(TASKS))


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("tasks", [TASKS, TASKS[:1], (), tuple((0, f"{number:09b}") for number in range(400))])
def test_chunks_hold_every_task_once_in_order(tasks: tuple[Task, ...], count: int) -> None:
    pieces = list(chunks(reversed(tasks), count))
    assert [task for piece in pieces for task in piece] == sorted(tasks)
    assert all(len(piece) <= 8 and len({batch for batch, _ in piece}) == 1 for piece in pieces)
    assert len(pieces) >= min(len(tasks), 4 * count)


@pytest.mark.parametrize(("gpus", "count"), [(1, 1), (1, 3), (1, 6), (3, 4), (4, 2), (8, 8)])
def test_workers_fit_on_the_gpus(gpus: int, count: int) -> None:
    share = gpu_share(gpus, count)
    assert 0 < share <= 1
    assert gpus * int(1 / share) >= count


def test_machine_without_gpu_needs_none() -> None:
    assert gpu_share(0, 4) == 0


def test_missing_ray_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(RuntimeUnavailableError, match=r"recache-compile\[ray\]"):
        RayRunner(tmp_path, 1)


def test_address_without_cluster_is_an_error_at_once(ray: Any, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(RuntimeUnavailableError, match=f"no Ray cluster can be joined at {address}"):
        RayRunner(tmp_path, 1, address)
    assert not ray.is_initialized()


@pytest.mark.slow
def test_losses_have_the_same_bits_as_without_ray(ray: Any, study: Path, rows: list[TaskLosses]) -> None:
    with RayRunner(study, 2) as runner:
        assert sorted(runner.run(TASKS)) == rows
        assert list(runner.run(())) == []
    assert not ray.is_initialized()


@pytest.mark.slow
def test_killed_worker_is_replaced(
    ray: Any, study: Path, rows: list[TaskLosses], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(workers, "RETRIES", 1)
    with RayRunner(study, 1) as runner:
        (before,) = _pids(ray, runner)
        running = runner.run(TASKS)
        found = [next(running)]
        os.kill(before, signal.SIGKILL)
        found += running
        assert sorted(found) == rows
        assert _pids(ray, runner) != [before]
    assert capfd.readouterr().out == ""


@pytest.mark.slow
def test_work_that_kills_every_worker_is_an_error(
    ray: Any, study: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    class Crashing:
        def __init__(self, folder: Path, threads: int, place: Any) -> None: ...

        def run(self, tasks: tuple[Task, ...]) -> list[TaskLosses]:
            os._exit(1)

    monkeypatch.setattr(workers, "RETRIES", 1)
    monkeypatch.setattr(workers, "Worker", Crashing)
    with RayRunner(study, 1) as runner, pytest.raises(RuntimeUnavailableError, match="lost too many"):
        list(runner.run(TASKS))
    assert capfd.readouterr().out == ""


@pytest.mark.slow
def test_errors_of_workers_arrive_as_they_are(ray: Any, study: Path, rows: list[TaskLosses], tmp_path: Path) -> None:
    """In a cluster that is there already, and stays."""
    damaged = tmp_path / "damaged"
    shutil.copytree(study, damaged)
    (damaged / "samples" / "1.safetensors").write_bytes(b"no tensors")
    ray.init("local", num_cpus=1, include_dashboard=False, object_store_memory=workers.OBJECT_STORE)
    try:
        unread = pytest.raises(ArtifactError, match="cannot read it; keep it on a file system that all")
        with RayRunner(tmp_path / "elsewhere", 1) as runner, unread:
            next(runner.run(TASKS))
        with RayRunner(damaged, 1) as runner:
            with pytest.raises(ArtifactError, match=r"1\.safetensors: damaged .* remove it") as caught:
                list(runner.run(TASKS))
            assert caught.type is ArtifactError
            assert sorted(runner.run(TASKS[: len(MASKS)])) == rows[: len(MASKS)]
        assert ray.is_initialized()
    finally:
        ray.shutdown()


@pytest.mark.slow
def test_interrupted_run_goes_on_where_it_was(ray: Any, study: Path, rows: list[TaskLosses], tmp_path: Path) -> None:
    schedules, file = [Schedule.from_mask(mask) for mask in MASKS], tmp_path / "losses.jsonl"
    with RayRunner(study, 2) as runner:
        with pytest.raises(KeyboardInterrupt):
            Losses(file, runner, 2, 2, 0, report=_interrupt_after_three).losses(schedules, (0, 1))
        watched = Watched(runner)
        losses = Losses(file, watched, 2, 2, 0, alpha=0.5).losses(schedules, (0, 1))
    done = len(TASKS) - len(watched.tasks)
    assert done == 3
    expected = {task: np.array(distances) - 0.5 * np.array(rewards) for task, distances, rewards in rows}
    assert np.array_equal(losses, [np.concatenate([expected[0, mask], expected[1, mask]]) for mask in MASKS])


class Watched:
    """A runner that remembers what it was asked."""

    def __init__(self, runner: RayRunner) -> None:
        self.tasks: list[Task] = []
        self._runner = runner

    def run(self, tasks: Iterable[Task]) -> Iterator[TaskLosses]:
        self.tasks += tasks
        return self._runner.run(self.tasks)


def _interrupt_after_three(done: int, total: int) -> None:
    if done == 3:
        raise KeyboardInterrupt


def _pids(ray: Any, runner: RayRunner) -> list[int]:
    return ray.get([actor.__ray_call__.remote(lambda worker: os.getpid()) for actor in runner._actors])  # type: ignore[no-any-return]
