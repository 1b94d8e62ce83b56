"""Pictures of schedules: those of several policies side by side, and how training found them."""

from collections.abc import Mapping, Sequence
from itertools import groupby
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np

from recache_compile.errors import ScheduleError
from recache_compile.ir.schedule import Schedule
from recache_compile.policies.base import Progress
from recache_compile.support.files import writing

RECOMPUTED, CACHED = "#1f4e79", "#dce6f0"
INK, GRID = "#333333", "#eeeeee"
STAGES = ("#d9d9d9", "#a6a6a6", "#404040", "#787878", "#c2c2c2")
"""Greys, so that they differ from the colours of the budgets."""

STEP_AXIS = "denoising step (dark: recomputed)"

COLUMNS = 4
"""Images in a row at most."""

LONGEST_LABEL = 32

History = Sequence[tuple[int, Progress]]
"""Generations spent, and where the search was."""


def draw_schedules(schedules: Mapping[str, Mapping[int, Schedule]], file: Path) -> None:
    """Write a PNG of the schedules of policies: one panel a budget, one row a policy.

    Args:
        schedules: by policy and budget; all of one number of steps.
        file: where to write.

    Raises:
        ScheduleError: there are none.
        ArtifactError: the file cannot be written.
    """
    _save(schedules_figure(schedules), file)


def draw_training(progress: History, file: Path) -> None:
    """Write a PNG of a training run: losses, entropies and best schedules against generations.

    Args:
        progress: generations spent and what was reported then, in the order of the reports.
        file: where to write.

    Raises:
        ScheduleError: nothing was reported.
        ArtifactError: the file cannot be written.
    """
    _save(training_figure(progress), file)


def schedules_figure(schedules: Mapping[str, Mapping[int, Schedule]]) -> Any:
    """The figure of `draw_schedules`: its axes are the budgets, smallest first."""
    budgets = sorted({budget for each in schedules.values() for budget in each})
    if not budgets:
        raise ScheduleError("schedules: there are none to draw; name at least one policy and one budget")
    figure = _figure(9.0, len(budgets) * (0.3 * len(schedules) + 0.36) + 0.45)
    panels = figure.subplots(len(budgets), 1, sharex=True, squeeze=False)[:, 0]
    for axes, budget in zip(panels, budgets, strict=True):
        _plain(axes)
        axes.set_title(f"k = {budget}", loc="left", fontsize=10, fontweight="bold", color=INK)
        axes.set_yticks(range(len(schedules)), [_shortened(label) for label in schedules])
        axes.set_ylim(len(schedules) - 0.4, -0.6)
        for row, of_policy in enumerate(schedules.values()):
            if budget in of_policy:
                _draw_row(axes, row, of_policy[budget])
    panels[-1].set_xlabel(STEP_AXIS, fontsize=10, color=INK)
    return figure


def training_figure(progress: History) -> Any:
    """The figure of `draw_training`: axes of stages, losses, entropies if any, then one a budget."""
    budgets = sorted({each.budget for _, each in progress})
    if not budgets:
        raise ScheduleError("training: nothing was reported, so there is nothing to draw")
    entropies = any(each.entropy is not None for _, each in progress)
    heights = (3.2 + 1.6 * entropies, 2.9 * -(-len(budgets) // COLUMNS))
    figure = _figure(9.0, sum(heights))
    above, below = figure.subfigures(2, 1, height_ratios=heights)
    _draw_above(above, progress, entropies)
    _draw_below(below, progress, budgets)
    return figure


def _draw_above(figure: Any, progress: History, entropies: bool) -> None:
    """Everything whose horizontal axis is the generations."""
    heights = [0.07, 1.0, 0.6][: 2 + entropies]
    ribbon, *curves = figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    _draw_stages(ribbon, progress)
    _draw_curves(curves[0], progress, "loss", "training loss", "steps-post")
    _use_logarithms(curves[0])
    if entropies:
        _draw_curves(curves[1], progress, "entropy", "entropy (nats)", "default")
    end = max(1, *(spent for spent, _ in progress))
    ribbon.set_xlim(-0.008 * end, 1.008 * end)
    curves[0].legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1.0, 1.03), labelcolor=INK)
    curves[-1].set_xlabel("generations spent", fontsize=10, color=INK)


def _draw_below(figure: Any, progress: History, budgets: Sequence[int]) -> None:
    """The schedules of every budget over training."""
    columns = min(COLUMNS, len(budgets))
    panels = list(figure.subplots(-(-len(budgets) // columns), columns, squeeze=False).flat)
    for axes, budget in zip(panels, budgets, strict=False):
        _draw_evolution(axes, progress, budget)
    for axes in panels[len(budgets) :]:
        axes.remove()
    figure.supxlabel(STEP_AXIS, fontsize=10, color=INK)
    figure.supylabel("generations spent", fontsize=10, color=INK)


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Any, file: Path) -> None:
    with writing(file) as partial:
        figure.savefig(partial, format="png", dpi=130)


def _plain(axes: Any) -> None:
    """No frame, no tick marks, legible and quiet numbers."""
    axes.tick_params(labelsize=9, length=0, labelcolor=INK)
    for side in axes.spines.values():
        side.set_visible(False)


def _shortened(label: str) -> str:
    """The end of a long label, such as a file's path."""
    return label if len(label) <= LONGEST_LABEL else "…" + label[1 - LONGEST_LABEL :]


def _draw_row(axes: Any, row: int, schedule: Schedule) -> None:
    """Recompute steps as dark bars along the loop."""
    steps = schedule.num_steps
    colors = [RECOMPUTED if bit == "1" else CACHED for bit in schedule.mask]
    axes.bar(range(steps), [0.74] * steps, bottom=row - 0.37, width=0.86, color=colors)
    axes.set_xlim(-0.5, steps - 0.5)
    axes.xaxis.get_major_locator().set_params(integer=True)


def _draw_stages(axes: Any, progress: History) -> None:
    """A ribbon of what was being done; a stage reaches back to the last report of the one before."""
    _plain(axes)
    axes.set_yticks([])
    axes.tick_params(labelbottom=False)
    colors: dict[str, str] = {}
    begin, least = 0, max(spent for spent, _ in progress) / 250
    for stage, reports in groupby(progress, key=lambda item: item[1].stage):
        *_, (end, _) = reports
        label = None if stage in colors else stage
        color = colors.setdefault(stage, STAGES[len(colors) % len(STAGES)])
        axes.axvspan(begin, max(end, begin + least), color=color, lw=0, label=label, zorder=1 + (end == begin))
        begin = end
    axes.legend(
        frameon=False, fontsize=9, ncols=len(colors), loc="lower left", bbox_to_anchor=(0.0, 0.9),
        handlelength=1.2, borderpad=0.1, labelcolor=INK,
    )  # fmt: skip


def _draw_curves(axes: Any, progress: History, quantity: str, label: str, drawstyle: str) -> None:
    """One line a budget, over the reports that know the quantity."""
    from matplotlib import colormaps

    _plain(axes)
    axes.grid(axis="y", color=GRID)
    axes.set_ylabel(label, fontsize=10, color=INK)
    budgets = sorted({each.budget for _, each in progress})
    shades = colormaps["viridis"](np.linspace(0, 0.85, len(budgets)))
    for budget, shade in zip(budgets, shades, strict=True):
        known = [(spent, getattr(each, quantity)) for spent, each in progress if each.budget == budget]
        points = [(spent, value) for spent, value in known if value is not None and isfinite(value)]
        style = {"drawstyle": drawstyle, "marker": "o", "ms": 2.5, "lw": 1.6}
        axes.plot(*np.array(points).reshape(-1, 2).T, **style, color=shade, label=f"k = {budget}")


def _use_logarithms(axes: Any) -> None:
    """A logarithmic scale where all values are positive, with plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    values = np.concatenate([line.get_ydata() for line in axes.lines])
    if not len(values) or values.min() <= 0:
        return
    axes.set_yscale("log")
    wide = values.max() > 10 * values.min()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)) if wide else MaxNLocator(5, steps=[1, 2, 5, 10]))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _draw_evolution(axes: Any, progress: History, budget: int) -> None:
    """The best schedules of one budget, from its first report at the top to the end of the run."""
    from matplotlib.colors import ListedColormap

    best = {spent: each.schedule for spent, each in progress if each.budget == budget}
    end = max(spent for spent, _ in progress)
    edges = [*best, max(end, max(best) + max(1, end // 40))]
    image = np.array([[int(bit) for bit in schedule.mask] for schedule in best.values()])
    columns = np.arange(image.shape[1] + 1) - 0.5
    axes.pcolormesh(columns, edges, image, cmap=ListedColormap([CACHED, RECOMPUTED]), vmin=0, vmax=1)
    _plain(axes)
    axes.set_ylim(edges[-1], edges[0])
    axes.set_title(f"k = {budget}", loc="left", fontsize=10, fontweight="bold", color=INK)
