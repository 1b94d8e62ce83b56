"""What a user sees of a training: one live line, or one line for each change where there is no terminal."""

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table

from recache_compile.policies.base import Progress
from recache_compile.search.train import Trained, Trainer
from recache_compile.support.log import told

SPEED_SECONDS = 3600.0
"""The time left is guessed from so much of the past: reports can be minutes apart."""


@contextlib.contextmanager
def show_training(
    console: Console, trainer: Trainer, budgets: int
) -> Iterator[tuple[Callable[[Progress], None], Callable[[int, int], None]]]:
    """Two functions that show the progress of a search, and how many losses of those asked for are there.

    Stages that the package logs are shown too.

    Args:
        console: where.
        trainer: what is run, for the time left.
        budgets: how many it is run for.
    """
    last: dict[int, tuple[str, tuple[int, ...]]] = {}

    def line(each: Progress) -> str:
        entropy = "" if each.entropy is None else f"  entropy {each.entropy:.2f}"
        steps = " ".join(map(str, each.schedule.recompute_steps))
        return f"{each.stage} k={each.budget}  loss {each.loss:.4g}{entropy}  {steps}"

    if not console.is_terminal:

        def write(text: str) -> None:
            console.print(text, highlight=False, markup=False, soft_wrap=True)

        def write_change(each: Progress) -> None:
            now = each.stage, each.schedule.recompute_steps
            if last.get(each.budget) != now:
                write(line(each))
            last[each.budget] = now

        with told(write):
            yield write_change, lambda done, asked: None
        return
    total, after_fit = trainer.reports(budgets), trainer.reports(0)
    text, losses = TextColumn("{task.description}", markup=False), TextColumn("{task.fields[losses]}")
    columns = text, losses, BarColumn(), TimeRemainingColumn()
    with Bar(*columns, console=console, speed_estimate_period=SPEED_SECONDS) as bar:
        task = bar.add_task("starting", total=total, losses="")

        def advance(each: Progress) -> None:
            last.setdefault(each.budget, ("", ()))
            before = {"race": len(last) - 1, "fit": len(last)}.get(each.stage)  # what ended early is skipped
            started = 0 if before is None else trainer.reports(before) - after_fit
            done = max(bar.tasks[0].completed + 1, started)
            bar.update(task, completed=min(done, total), description=line(each))

        def count(done: int, asked: int) -> None:
            bar.update(task, losses=f"{done}/{asked}")

        with told(lambda stage: bar.update(task, description=stage)):
            yield advance, count


def table_of(trained: Trained) -> Table:
    """Held-out losses of the trained and the uniform schedules."""
    table = Table(title=f"held-out loss after {trained.generations:,} generations")
    for column in ("budget", "recompute steps", "trained", "uniform", "change"):
        table.add_column(column, justify="left" if column == "recompute steps" else "right")
    for budget, steps in trained.policy.facts["schedules"].items():
        losses = trained.losses[int(budget)]
        ours, uniform = losses["trained"], losses["uniform"]
        change = f"{ours[0] / uniform[0] - 1:+.0%}" if uniform[0] > 0 and ours[0] > 0 else "-"
        both = (f"{mean:.4g} ± {error:.2g}" for mean, error in (ours, uniform))
        table.add_row(budget, " ".join(map(str, steps)), *both, change)
    return table
