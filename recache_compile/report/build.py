"""`recache-compile report`: contents into one page that needs nothing else."""

from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from recache_compile.artifact.inspect import with_unit
from recache_compile.evaluation.result import EvaluationLine, EvaluationResult
from recache_compile.evaluation.wording import UNSURE, percent, plain, target_line
from recache_compile.models.registry import EMBEDDED, find
from recache_compile.report.contents import GAIN, Contents, heat_scale, read_contents
from recache_compile.support.files import writing

PIXELS = 128
"""Pictures up to this size are shown with visible pixels, as they are."""


def write_report(folder: Path, output: Path, bench: Path | None = None) -> Contents:
    """Write the page of the evaluation in a folder.

    Args:
        folder: what `evaluate` wrote.
        output: the HTML file.
        bench: JSON of a run of `bench`, for a table of peers.

    Raises:
        ArtifactError: there is no finished evaluation, or the page cannot be written.
    """
    page = read_contents(folder, bench)
    text = html_of(page, folder)
    with writing(output) as partial:
        partial.write_text(text, encoding="utf-8")
    return page


def html_of(page: Contents, folder: Path) -> str:
    """The page as text."""
    environment = Environment(
        loader=PackageLoader("recache_compile.report", ""), autoescape=True, undefined=StrictUndefined
    )
    environment.filters |= {"percent": percent, "plain": plain, "unit": with_unit}
    parts = {name: Path(__file__).with_name(f"page.{name}").read_text(encoding="utf-8") for name in ("css", "js")}
    result = page.result
    best, embedded = _best(result, page.policies[0]), find(result.model)
    return environment.get_template("page.html").render(
        page=page,
        folder=folder,
        name=Path(result.model).name,
        headline=_headline(result, best),
        tiles=_tiles(result, best),
        shown=best.budget,
        small=page.side <= PIXELS,
        targets=[target_line(result, policy) for policy in page.policies],
        scale=heat_scale(),
        gain=GAIN,
        unsure=UNSURE,
        features="" if embedded is None else embedded.features,
        own_metrics=[
            f"{judge.name} of {each.name}" for each in EMBEDDED.values() for judge in each.judges if judge.counts
        ],
        peak=max(1e-9, *(taken for row in page.times for taken in row.steps)),
        most=max(1, *(line.history_bytes + line.table_bytes for line in result.lines)),
        **{name: Markup(text) for name, text in parts.items()},
    )


def _best(result: EvaluationResult, policy: str) -> EvaluationLine:
    """The line that is shown first: the smallest budget that meets the target, else the largest."""
    lines = sorted((line for line in result.lines if line.policy == policy), key=lambda line: line.budget)
    budget = result.smallest(policy)
    return next((line for line in lines if line.budget == budget), lines[-1])


def _headline(result: EvaluationResult, best: EvaluationLine) -> str:
    name, losses = Path(result.model).name, [loss for loss in best.losses.values() if loss.value is not None]
    if not best.target.startswith("pass") or not losses:
        return f"{name} at fixed compute: what every budget gives and costs"
    worst = percent(max(losses, key=lambda loss: loss.value or 0.0))
    speed = f"{best.speedup:.{0 if best.speedup >= 10 else 1}f}"
    return f"{name}: {best.budget} of {result.num_steps} steps recomputed, {speed} times as fast, loss {worst}"


def _tiles(result: EvaluationResult, best: EvaluationLine) -> list[tuple[str, str]]:
    """The numbers that are looked for first."""
    tiles = [(f"k = {best.budget}", f"of {result.num_steps} steps recomputed, {best.policy}")]
    tiles.append((f"÷ {best.macs_reduction:.1f}", "multiply-accumulates"))
    tiles.append((f"× {best.speedup:.1f}", "speed of the whole pipeline"))
    if "psnr" in best.values and best.values["psnr"].value is not None:
        tiles.append((f"{best.values['psnr'].value:.1f} dB", "PSNR against uncached"))
    for name, loss in best.losses.items():
        value, _, error = percent(loss).partition(" ± ")
        tiles.append(
            (
                value if value.endswith("%") else f"{value} %",
                f"± {error} loss in {name}" if error else f"loss in {name}",
            )
        )
    return tiles
