"""Write docs/schedules.md and its plots from the results of benchmarks/schedules.py."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from recache_compile.models.registry import EMBEDDED
from recache_compile.support.files import writing

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999999", "#8c564b", "#7f7f00")
ORDER = (
    *("trained", "search", "recache", "climb", "gram", "uniform", "front-loaded", "dp", "minimax"),
    *("teacache", "magcache", "annealing", "nsga2", "fewer steps"),
)
"""Rows of the tables."""

OURS = ("trained", "search", "recache", "climb", "gram", "uniform", "fewer steps")
"""Not rivals."""


def write_page(folder: Path, docs: Path) -> None:
    """Fill the template with every part that has a result."""
    text = (Path(__file__).parent / "schedules.md").read_text(encoding="utf-8")
    results = {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("*.json"))}
    truths = [truth for name in ("reuse-0", "taylor-1", "hicache-2") for truth in results.get(f"truth-{name}", [])]
    parts = {"truth": "\n\n".join(map(truth_table, truths))}
    for name in ("taylor-1", "hicache-2"):
        parts[f"shipped-{name}"] = shipped_table(name)
    if "rivals-taylor-1" in results:
        parts["rivals-taylor-1"] = rivals_table(results["rivals-taylor-1"])
        draw_rivals(results["rivals-taylor-1"], docs / "schedules-taylor-1.png")
    if "forecasters" in results:
        parts["forecasters"] = forecasters_table(results["forecasters"])
    if "efficiency" in results:
        parts["efficiency"] = efficiency_table(results["efficiency"])
        draw_efficiency(results["efficiency"], docs / "schedules-efficiency.png")
    for name, part in parts.items():
        text = text.replace(f"<!-- {name} -->", part)
    with writing(docs / "schedules.md") as partial:
        partial.write_text(text, encoding="utf-8")


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; all columns but the first are numbers."""
    lines = ["| " + " | ".join(header) + " |", "|---|" + "---:|" * (len(header) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def truth_table(truth: Mapping[str, Any]) -> str:
    """Regret of every policy among all schedules."""
    rows = [
        [name, " ".join(map(str, row["steps"])), f"{row['regret']:.1%}", f"{row['held_out_regret']:.1%}", f"{row['generations']:,}"]
        for name in ORDER
        if (row := truth["policies"].get(name))
    ]  # fmt: skip
    correlations = truth["rank_correlations"]
    head = (
        f"**{truth['forecaster']}, order {truth['order']}, T = {truth['num_steps']}, k = {truth['budget']}**:"
        f" {truth['schedules']:,} schedules on {truth['samples']} + {truth['held_out_samples']} samples. Best:"
        f" {' '.join(map(str, truth['best']))}, loss {truth['best_loss']:.4g}. Rank correlation of the surrogate with"
        f" the loss: {correlations['predictions']:.2f} on predictions, {correlations['features']:.2f} on features. Mean"
        f" regret of REINFORCE over five seeds: {truth['likelihoods']['set']:.1%} with the set's log-probability,"
        f" {truth['likelihoods']['ordered']:.1%} with the ordered one."
    )
    columns = ("policy", "steps", "regret", "held-out regret", "generations")
    return f"{head}\n\n{table(columns, rows)}"


def rivals_table(result: Mapping[str, Any]) -> str:
    """Held-out distance and its standard error, in thousandths, by policy and budget."""
    rivals = result["table"]
    budgets = list(rivals["uniform"])
    rows = []
    for name in (each for each in ORDER if each in rivals):
        cells = [rivals[name].get(budget) for budget in budgets]
        rows.append([name, *("–" if c is None else f"{1000 * c['mean']:.2f} ± {1000 * c['error']:.2f}" for c in cells)])
    change = [f"{rivals['trained'][k]['mean'] / rivals['uniform'][k]['mean'] - 1:+.0%}" for k in budgets]
    rows.append(["**trained against uniform**", *(f"**{each}**" for each in change)])
    rows.append(["trained against the best rival", *(best_rival(rivals, budget) for budget in budgets)])
    return table(["policy", *(f"k = {budget}" for budget in budgets)], rows)


def best_rival(rivals: Mapping[str, Any], budget: str) -> str:
    """Paired difference of the trained schedule to the best of the others, in standard errors."""
    others = {
        name: rows[budget] for name, rows in rivals.items() if name not in OURS and "behind" in rows.get(budget, {})
    }
    name, row = min(others.items(), key=lambda item: item[1]["mean"])
    if not row["behind"]["error"]:
        return f"the same ({name})"
    return f"{-row['behind']['mean'] / row['behind']['error']:+.1f} SE ({name})"


def shipped_table(name: str) -> str:
    """What a shipped policy says of itself: its schedules and their loss on samples that nothing was decided on."""
    file = EMBEDDED["shapes"].policies / name / "policy.json"
    facts = json.loads(file.read_text(encoding="utf-8"))
    rows = []
    for budget, steps in facts["schedules"].items():
        (ours, error), (uniform, its_error) = (
            facts["held_out_losses"][budget][each] for each in ("trained", "uniform")
        )
        both = (f"{1000 * ours:.2f} ± {1000 * error:.2f}", f"{1000 * uniform:.2f} ± {1000 * its_error:.2f}")
        rows.append([f"k = {budget}", " ".join(map(str, steps)), *both, f"{ours / uniform - 1:+.0%}"])
    head = f"{facts['generations']:,} generations for all budgets, judging included."
    return head + "\n\n" + table(["budget", "recompute steps", "trained", "uniform", "change"], rows)


def forecasters_table(result: Mapping[str, Any]) -> str:
    """Held-out distance of every forecaster on its own schedule and on the uniform one."""
    rows = []
    for key, row in result.items():
        name, order, budget = key.split()
        both = (f"{1000 * row_['mean']:.2f} ± {1000 * row_['error']:.2f}" for row_ in (row, row["uniform"]))
        rows.append([name, order, budget, *both, " ".join(map(str, row["steps"]))])
    return table(["forecaster", "order", "k", "own schedule", "uniform", "steps"], rows)


def efficiency_table(result: Mapping[str, Any]) -> str:
    """Generations after which each method had reached a loss."""
    curves = {name: curve for name, curve in result["curves"].items() if curve}
    best = {name: min(loss for _, loss in curve) for name, curve in curves.items()}
    target = min(loss for name, loss in best.items() if name.startswith("REINFORCE"))
    rows = []
    for name, curve in curves.items():
        reached = next((f"{spent:,}" for spent, loss in curve if loss <= target), "never")
        rows.append([name, f"{1000 * best[name]:.2f}", f"{curve[-1][0]:,}", reached])
    return table(["method", "best training loss", "generations in all", f"generations to {1000 * target:.2f}"], rows)


def draw_rivals(result: Mapping[str, Any], file: Path) -> None:
    """Held-out distance against budget, one line a policy."""
    figure, axes = _figure()
    rivals = result["table"]
    for number, name in enumerate(each for each in ORDER if each in rivals):
        budgets = [int(budget) for budget in rivals[name]]
        means = [row["mean"] for row in rivals[name].values()]
        ours = name == "trained"
        axes.plot(
            budgets, means, label=name, color=COLORS[number % len(COLORS)], marker="o" if ours else ".",
            linewidth=2.6 if ours else 1.2, linestyle="-" if number < len(COLORS) else "--", zorder=3 if ours else 2,
        )  # fmt: skip
    axes.set(xlabel="recompute steps k of T = 50", ylabel="distance to uncached, held out", yscale="log")
    axes.legend(ncols=2, frameon=False, fontsize=8)
    _save(figure, file)


def draw_efficiency(result: Mapping[str, Any], file: Path) -> None:
    """Best training loss so far against generations."""
    figure, axes = _figure()
    for number, (name, curve) in enumerate(result["curves"].items()):
        lowest, points = float("inf"), []
        for spent, loss in curve:
            lowest = min(lowest, loss)
            points.append((spent, lowest))
        axes.step(*zip(*points, strict=True), where="post", label=name, color=COLORS[number], linewidth=1.8)
    axes.set(xlabel="generations", ylabel="training loss of the best schedule", xscale="log", yscale="log")
    axes.legend(frameon=False)
    _save(figure, file)


def _figure() -> tuple[Figure, Any]:
    figure = Figure(figsize=(7.5, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    return figure, axes


def _save(figure: Figure, file: Path) -> None:
    with writing(file) as partial:
        figure.savefig(partial, format="png", dpi=120)
