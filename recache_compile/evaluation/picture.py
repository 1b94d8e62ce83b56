"""The picture that ends a compilation: uncached beside every budget."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from recache_compile.ir.schedule import Schedule
from recache_compile.support.files import writing


def save_comparison(
    pictures: Mapping[int | None, Sequence[Tensor]],
    schedules: Mapping[int, Schedule],
    prompts: Sequence[str],
    file: Path,
) -> None:
    """Write a PNG: one row a prompt, one column a budget, the schedules as bars below.

    Args:
        pictures: (3, H, W) in [0, 1] by budget; None stands for uncached.
        schedules: by budget.
        prompts: titles of the rows.
        file: where to write.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    rows, columns = len(prompts), len(pictures)
    figure = Figure(figsize=(1.9 * columns, 2.0 * rows + 0.6), layout="constrained")
    engine = figure.get_layout_engine()
    assert isinstance(engine, ConstrainedLayoutEngine)
    engine.set(hspace=0.06)
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows + 1, columns, squeeze=False, height_ratios=[1.0] * rows + [0.12])
    for column, (budget, drawn) in enumerate(pictures.items()):
        for row, picture in enumerate(drawn):
            axes = grid[row][column]
            axes.imshow(picture.clamp(0, 1).permute(1, 2, 0).float().numpy(), interpolation="nearest")
            axes.set_axis_off()
            if row == 0:
                title = "uncached" if budget is None else f"k = {budget}"
                axes.set_title(title, fontsize=11)
        _draw_schedule(grid[rows][column], None if budget is None else schedules[budget], schedules)
    for row, prompt in enumerate(prompts):
        axes = grid[row][0]
        caption = axes.text(0, -0.03, prompt, transform=axes.transAxes, fontsize=8, va="top", color="#555555")
        caption.set_in_layout(False)
    with writing(file) as partial:
        figure.savefig(partial, format="png", dpi=110)


def _draw_schedule(axes, schedule: Schedule | None, schedules: Mapping[int, Schedule]) -> None:  # type: ignore[no-untyped-def]
    """Recompute steps as dark bars on the loop's length; uncached is all dark."""
    steps = next(iter(schedules.values())).num_steps
    mask = (schedule or Schedule.every(steps)).mask
    colors = ["#1f4e79" if bit == "1" else "#dce6f0" for bit in mask]
    axes.bar(range(steps), [1.0] * steps, width=0.9, color=colors)
    axes.set_xlim(-0.5, steps - 0.5)
    axes.set_yticks([])
    axes.set_xticks([0, steps - 1])
    axes.tick_params(labelsize=6, length=0)
    for side in axes.spines.values():
        side.set_visible(False)
