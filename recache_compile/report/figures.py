"""Charts of the page: drawn by matplotlib in colours that the page's style decides."""

import io
import re
from typing import Any

import matplotlib
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from recache_compile.evaluation.metrics import Metric
from recache_compile.evaluation.result import EvaluationResult

INK, QUIET, GRID = "#010101", "#020202", "#030303"
SERIES = ("#040401", "#040402", "#040403", "#040404", "#040405", "#040406")
VARIABLES = {INK: "--ink", QUIET: "--quiet", GRID: "--grid"} | {
    color: f"--series-{number}" for number, color in enumerate(SERIES, start=1)
}
"""Colours that stand for the page's."""
MARKERS = "os^Dvp"
SIZE = (4.4, 3.1)
"""Inches of 72 points; the page scales it to its column."""


def pareto(result: EvaluationResult, metric: Metric) -> str:
    """Quality against compute: one line a policy, one point a budget, with standard errors."""
    figure = Figure(figsize=SIZE, layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.subplots()
    policies = list(dict.fromkeys(line.policy for line in result.lines))
    for number, policy in enumerate(policies):
        above = min(len(policies) - 1 - number, 3)  # the lower lines are wider, so that equal ones are all seen
        lines = sorted((line for line in result.lines if line.policy == policy), key=lambda line: line.budget)
        named = [(1 / line.macs_reduction, line.values[metric.name]) for line in lines if metric.name in line.values]
        points = [(part, each.value, each.error or 0.0) for part, each in named if each.value is not None]
        axes.errorbar(
            [100 * part for part, _, _ in points],
            [value for _, value, _ in points],
            [error for _, _, error in points],
            color=SERIES[number % len(SERIES)], marker=MARKERS[number % len(MARKERS)], ms=4.5 + 1.6 * above,
            lw=1.5 + 0.9 * above, elinewidth=1, label=policy,
        )  # fmt: skip
    uncached = result.uncached[metric.name].value if metric.name in result.uncached else None
    if uncached is not None:
        axes.axhline(uncached, color=QUIET, lw=1, dashes=(4, 3))
        axes.annotate(
            "uncached", (1, uncached), (0, 3), ("axes fraction", "data"), "offset points",
            ha="right", fontsize=8, color=QUIET,
        )  # fmt: skip
    _style(axes)
    axes.set_xlabel("MACs, % of uncached", color=QUIET, fontsize=9)
    return _svg(figure, metric.name)


def _style(axes: Any) -> None:
    for name, spine in axes.spines.items():
        spine.set_visible(name == "bottom")
        spine.set_color(GRID)
    axes.grid(axis="y", color=GRID, lw=0.8)
    axes.set_axisbelow(True)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.tick_params(length=0, labelsize=9, labelcolor=QUIET)


def _svg(figure: Any, prefix: str) -> str:
    """The drawing itself, with the page's colours and font, and names that no other drawing has."""
    stream = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": prefix}):
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r'\bid="', f'id="{prefix}-', text)
    text = re.sub(r'(href="#|url\(#)', rf"\g<1>{prefix}-", text)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r'\1 aria-hidden="true"', text)
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", text)
    for color, variable in VARIABLES.items():
        text = text.replace(color, f"var({variable})")
    return text
