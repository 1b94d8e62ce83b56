"""Losses are kept line by line, and not run twice."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from recache_compile.errors import ArtifactError
from recache_compile.ir.schedule import Schedule
from recache_compile.search.objective import Losses, TaskLosses
from recache_compile.search.study import FIRST_HELD_OUT, Task

STEPS = 8
SCHEDULES = tuple(Schedule(steps, STEPS) for steps in ((0, 2, 5), (0, 2, 6), (0, 4)))


class Runner:
    """Makes losses up; counts what it is asked for, and fails after `most`."""

    def __init__(self, most: int = 1000) -> None:
        self.asked: list[Task] = []
        self.most = most

    def run(self, tasks: Iterable[Task]) -> Iterator[TaskLosses]:
        for number, mask in reversed(list(tasks)):  # in any order
            if len(self.asked) == self.most:
                raise KeyboardInterrupt
            self.asked.append((number, mask))
            yield (number, mask), *made_up(number, mask)


def made_up(number: int, mask: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    value = int(mask, 2) / 7 + number
    return (value, value + 0.1), (1 / value, -value)


def memo(file: Path, runner: Runner, **options: Any) -> Losses:
    return Losses(file, runner, batch_size=2, training=3, held_out=2, **options)


def test_losses_stand_where_schedules_and_batches_do(tmp_path: Path) -> None:
    losses = memo(tmp_path / "losses.jsonl", Runner(), alpha=2.0)
    assert losses.training == (0, 1, 2)
    assert losses.held_out == (FIRST_HELD_OUT, FIRST_HELD_OUT + 1)
    table = losses.losses([SCHEDULES[1], SCHEDULES[0], SCHEDULES[1]], (2, 0))
    for row, schedule in zip(table, (SCHEDULES[1], SCHEDULES[0], SCHEDULES[1]), strict=True):
        values = [made_up(number, schedule.mask) for number in (2, 0)]
        expected = [d - 2 * r for distances, rewards in values for d, r in zip(distances, rewards, strict=True)]
        assert row.tolist() == expected
    assert losses.losses([], (0, 1)).shape == (0, 4)


def test_known_losses_are_not_run_again(tmp_path: Path) -> None:
    file, first = tmp_path / "folder" / "losses.jsonl", Runner()
    table = memo(file, first).losses(SCHEDULES[:2], (0, 1))
    assert len(first.asked) == 4
    again = Runner()
    second = memo(file, again)
    assert second.generations == 0
    assert np.array_equal(second.losses(SCHEDULES[:2], (0, 1)), table)
    assert second.generations == 8  # as if they were run now
    assert again.asked == []
    second.losses(SCHEDULES[:3], (1, 2))
    assert sorted(again.asked) == sorted(
        (number, SCHEDULES[at].mask) for number, at in ((1, 2), (2, 0), (2, 1), (2, 2))
    )
    assert second.generations == 16


def test_losses_of_an_interrupted_run_are_kept(tmp_path: Path) -> None:
    file, reports = tmp_path / "losses.jsonl", []
    with pytest.raises(KeyboardInterrupt):
        memo(file, Runner(most=2), report=lambda *each: reports.append(each)).losses(SCHEDULES, (0,))
    assert reports == [(1, 3), (2, 3)]
    again = Runner()
    assert memo(file, again).distances(SCHEDULES, (0,)).tolist() == [[*made_up(0, each.mask)[0]] for each in SCHEDULES]
    assert len(again.asked) == 1


def test_a_torn_last_line_is_run_again(tmp_path: Path) -> None:
    file = tmp_path / "losses.jsonl"
    memo(file, Runner()).losses(SCHEDULES, (0,))
    whole = file.read_bytes()
    for cut in (1, 20):
        file.write_bytes(whole[:-cut])
        again = Runner()
        table = memo(file, again).distances(SCHEDULES, (0,))
        assert table.tolist() == [[*made_up(0, each.mask)[0]] for each in SCHEDULES]
        assert len(again.asked) == 1
        assert sorted(file.read_bytes().splitlines()) == sorted(whole.splitlines())


def test_a_file_that_is_torn_in_its_first_line_is_as_good_as_none(tmp_path: Path) -> None:
    file = tmp_path / "losses.jsonl"
    file.write_bytes(b'[0, "1010')
    assert memo(file, Runner()).generations == 0
    assert file.read_bytes() == b""


@pytest.mark.parametrize("line", ["", "x", "5", "{}", '[0, "1000"]', '[0, "1000", 1.0, 2.0]', "\0" * 9])
def test_a_damaged_line_is_named(line: str, tmp_path: Path) -> None:
    file = tmp_path / "losses.jsonl"
    memo(file, Runner()).losses(SCHEDULES[:2], (0,))
    first, second = file.read_text().splitlines()
    file.write_text(f"{first}\n{line}\n{second}\n")
    with pytest.raises(ArtifactError, match=r"losses\.jsonl: line 2 is damaged; remove the line, it is then run again"):
        memo(file, Runner())


def test_losses_are_read_to_the_last_bit(tmp_path: Path) -> None:
    class Odd(Runner):
        def run(self, tasks: Iterable[Task]) -> Iterator[TaskLosses]:
            for task in tasks:
                yield task, (0.1 + 0.2, 1e-300), (float("inf"), -1 / 3)

    file = tmp_path / "losses.jsonl"
    table = memo(file, Odd()).rewards(SCHEDULES[:1], (0,))
    assert np.array_equal(memo(file, Runner()).rewards(SCHEDULES[:1], (0,)), table)
    assert memo(file, Runner()).distances(SCHEDULES[:1], (0,)).tolist() == [[0.1 + 0.2, 1e-300]]
