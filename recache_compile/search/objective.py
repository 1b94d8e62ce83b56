"""The true loss of schedules, L = d(x_cached, x_full) - alpha R(x_cached), remembered on disk."""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from recache_compile.errors import ArtifactError
from recache_compile.ir.schedule import Schedule
from recache_compile.search.study import Task, held_out_batches

TaskLosses = tuple[Task, tuple[float, ...], tuple[float, ...]]
"""A task, and the distances and rewards of its samples."""


class Runner(Protocol):
    """Runs generations, here or elsewhere."""

    def run(self, tasks: Iterable[Task]) -> Iterator[TaskLosses]:
        """Distances and rewards of every task, in any order."""
        ...


class Losses:
    """`policies.base.Objective` on a study: whatever was run once is read, not run.

    Args:
        file: JSON lines, one for each task; a line that a killed process left torn is dropped.
        runner: runs what is not in the file.
        batch_size: samples in a batch.
        training, held_out: how many batches there are.
        alpha: weight of the reward.
        report: told how many of the tasks asked for are done, and of how many.
    """

    def __init__(
        self,
        file: Path,
        runner: Runner,
        batch_size: int,
        training: int,
        held_out: int,
        alpha: float = 0.0,
        report: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        self.training = tuple(range(training))
        self.held_out = held_out_batches(held_out)
        self.batch_size = batch_size
        self.alpha = alpha
        self._file, self._runner, self._report = file, runner, report
        self._known: dict[Task, tuple[tuple[float, ...], tuple[float, ...]]] = dict(_read(file))
        self._asked: set[Task] = set()

    @property
    def generations(self) -> int:
        """Generations that the losses asked of this object take; those that were known count like the others.

        A search that goes on after a stop thus tells the same as one that was never stopped.
        """
        return len(self._asked) * self.batch_size

    def losses(self, schedules: Sequence[Schedule], batches: Sequence[int]) -> np.ndarray:
        """Loss of every schedule on every sample (schedules, batches * batch_size)."""
        return self.distances(schedules, batches) - self.alpha * self.rewards(schedules, batches)

    def distances(self, schedules: Sequence[Schedule], batches: Sequence[int]) -> np.ndarray:
        """d of every schedule on every sample (schedules, batches * batch_size)."""
        return self._table(schedules, batches, 0)

    def rewards(self, schedules: Sequence[Schedule], batches: Sequence[int]) -> np.ndarray:
        """R of every schedule on every sample (schedules, batches * batch_size)."""
        return self._table(schedules, batches, 1)

    def _table(self, schedules: Sequence[Schedule], batches: Sequence[int], which: int) -> np.ndarray:
        masks = [schedule.mask for schedule in schedules]
        self._run({(batch, mask) for batch in batches for mask in masks})
        rows = [[value for batch in batches for value in self._known[batch, mask][which]] for mask in masks]
        return np.array(rows).reshape(len(masks), len(batches) * self.batch_size)

    def _run(self, tasks: set[Task]) -> None:
        """Run the tasks that are not known; each is written down as soon as it is done."""
        self._asked |= tasks
        missing = sorted(tasks - set(self._known))
        if not missing:
            return
        self._file.parent.mkdir(parents=True, exist_ok=True)
        with self._file.open("a", encoding="utf-8") as stream:
            for done, (task, distances, rewards) in enumerate(self._runner.run(missing), start=1):
                stream.write(json.dumps([*task, distances, rewards]) + "\n")
                stream.flush()
                self._known[task] = distances, rewards
                self._report(done, len(missing))


def _read(file: Path) -> Iterator[tuple[Task, tuple[tuple[float, ...], tuple[float, ...]]]]:
    """The tasks of a file; its last line is cut off where it is torn."""
    if not file.exists():
        return
    text = file.read_bytes()
    whole, _, torn = text.rpartition(b"\n")
    if torn:
        os.truncate(file, len(text) - len(torn))
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            batch, mask, distances, rewards = json.loads(line)
            row = (int(batch), str(mask)), (tuple(distances), tuple(rewards))
        except (ValueError, TypeError):
            raise ArtifactError(f"{file}: line {number} is damaged; remove the line, it is then run again") from None
        yield row
