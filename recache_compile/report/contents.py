"""What the page shows, read from the folder of an evaluation."""

import base64
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import to_hex
from PIL import Image
from torch import Tensor

from recache_compile.bench.page import read_bench
from recache_compile.bench.session import BenchResult
from recache_compile.errors import ArtifactError
from recache_compile.evaluation.metrics import METRICS, Metric
from recache_compile.evaluation.profile import PROFILE, Profile
from recache_compile.evaluation.result import EvaluationLine, EvaluationResult, read_result
from recache_compile.evaluation.runner import PICTURES, Values, read_values
from recache_compile.evaluation.setting import Setting, read_setting
from recache_compile.ir.schedule import Schedule
from recache_compile.report.figures import pareto
from recache_compile.support.records import read_record

SMALL = 256
"""Pixels up to which pictures are kept without loss."""
LARGEST = 1024
GAIN = 4
"""Differences are shown so many times as large."""
HEAT = "magma"
DARKEST, LIGHTEST = 0.06, 0.94
"""The part of the colour map that is used: its ends vanish on dark and on light paper."""


@dataclass(frozen=True, slots=True)
class Picture:
    """One picture of the contact sheet.

    Args:
        policy, budget: of its schedule; "" and T for the uncached one.
        source: as a data URI.
        difference: from the uncached one, as a data URI; "" of the uncached one itself.
        facts: its own values beside the uncached one, as text.
    """

    policy: str
    budget: int
    source: str
    difference: str
    facts: str


@dataclass(frozen=True, slots=True)
class Sample:
    """One prompt and noise: the uncached picture first."""

    prompt: str
    seed: int
    pictures: tuple[Picture, ...]


@dataclass(frozen=True, slots=True)
class Cell:
    """A rectangle of a heat map: column, colour, and the text shown when the pointer is on it."""

    column: int
    color: str
    title: str


@dataclass(frozen=True, slots=True)
class HeatRow:
    """One block's output; the group is the module list that the block is in."""

    group: str
    name: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True, slots=True)
class TimeRow:
    """Where the time of one generation goes.

    Args:
        budget: number of recompute steps.
        total: seconds of the pipeline call.
        spread: of the fastest and the slowest.
        steps: milliseconds of every step.
        recompute: whether each was recomputed.
        rest: milliseconds outside of the transformer.
    """

    budget: int
    total: float
    spread: tuple[float, float]
    steps: tuple[float, ...]
    recompute: tuple[bool, ...]
    rest: float


@dataclass(frozen=True, slots=True)
class Contents:
    """All of the page.

    Args:
        result, setting: as the evaluation left them.
        bench: a run of `bench`, where one was given.
        metrics: those that were measured.
        policies, budgets: those that were evaluated.
        samples: with their pictures.
        side: pixels of the longer side of a picture.
        charts: SVG of quality against compute, by metric.
        heat: how much every block's features change; `heat_range` are the changes of its colours.
        times: of every budget, uncached last.
    """

    result: EvaluationResult
    setting: Setting
    bench: BenchResult | None
    metrics: tuple[Metric, ...]
    policies: tuple[str, ...]
    budgets: tuple[int, ...]
    samples: tuple[Sample, ...]
    side: int
    charts: Mapping[str, str]
    heat: tuple[HeatRow, ...]
    heat_range: tuple[float, float]
    times: tuple[TimeRow, ...]


def read_contents(folder: Path, bench: Path | None) -> Contents:
    """Everything that the page shows.

    Raises:
        ArtifactError: the folder holds no finished evaluation.
    """
    setting, result = read_setting(folder), read_result(folder)
    profile = read_record(folder / PROFILE, Profile, "remove it, and run `recache-compile evaluate` again")
    known = {name for each in result.lines for name in each.values}
    heat, heat_range = _heat(profile)
    samples, side = _samples(folder, setting, result)
    return Contents(
        result=result,
        setting=setting,
        bench=None if bench is None else read_bench(bench),
        metrics=tuple(metric for name, metric in METRICS.items() if name in known),
        policies=tuple(dict.fromkeys(line.policy for line in result.lines)),
        budgets=tuple(sorted({line.budget for line in result.lines})),
        samples=samples,
        side=side,
        charts={name: pareto(result, METRICS[name]) for name in METRICS if name in known},
        heat=heat,
        heat_range=heat_range,
        times=_times(profile, result),
    )


def _samples(folder: Path, setting: Setting, result: EvaluationResult) -> tuple[tuple[Sample, ...], int]:
    """Those whose pictures were kept, and the pixels of their longer side."""
    found: list[Sample] = []
    side = 0
    for number in range(result.samples // setting.batch_size):
        values = read_values(folder, number)
        if PICTURES not in values.get(setting.uncached, {}):
            break
        batch, side = setting.batch(number), max(values[setting.uncached][PICTURES].shape[-2:])
        for place in range(len(values[setting.uncached][PICTURES])):
            pictures = _pictures(values, place, setting, result)
            found.append(Sample(batch.prompts[place], batch.seeds[place], pictures))
    if not found:
        raise ArtifactError(f"{folder}: no pictures were kept; run `recache-compile evaluate` again")
    return tuple(found), side


def _pictures(values: Values, place: int, setting: Setting, result: EvaluationResult) -> tuple[Picture, ...]:
    uncached = values[setting.uncached][PICTURES][place]
    pictures = [Picture("", setting.num_steps, _source(uncached), "", "")]
    for line in result.lines:
        of_mask = values[_mask(line, setting)]
        if PICTURES in of_mask:
            made = of_mask[PICTURES][place]
            difference = _source(difference_map(made, uncached)[None])
            pictures.append(Picture(line.policy, line.budget, _source(made), difference, _facts(of_mask, place)))
    return tuple(pictures)


def difference_map(picture: Tensor, reference: Tensor) -> Tensor:
    """The largest difference of a channel in each pixel, times `GAIN`: bytes (H, W) from bytes (3, H, W)."""
    return ((picture.int() - reference.int()).abs().amax(0) * GAIN).clamp(max=255).byte()


def _mask(line: EvaluationLine, setting: Setting) -> str:
    return Schedule(line.recompute_steps, setting.num_steps).mask


def _facts(values: Mapping[str, Tensor], place: int) -> str:
    """PSNR and the like of one picture."""
    paired = [name for name, metric in METRICS.items() if metric.against == "uncached" and name in values]
    texts = (f"{name} {float(values[name][place]):.4g} {METRICS[name].unit}".strip() for name in paired)
    return " · ".join(texts)


def _source(picture: Tensor) -> str:
    """A picture of bytes, (3, H, W) or grey (1, H, W), as a data URI."""
    image = Image.fromarray(picture.permute(1, 2, 0).squeeze(2).numpy())
    image.thumbnail((LARGEST, LARGEST))
    kind, options = ("png", {}) if max(image.size) <= SMALL else ("webp", {"quality": 90})
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode()}"


def _heat(profile: Profile) -> tuple[tuple[HeatRow, ...], tuple[float, float]]:
    """Rows of coloured cells; the colours are logarithmic."""
    if profile.redundancy is None:
        return (), (0.0, 0.0)
    known = profile.redundancy
    values: Any = np.array([[np.nan if each is None else each for each in row] for row in known.changes], dtype=float)
    positive = values[values > 0]
    if not positive.size:
        return (), (0.0, 0.0)
    low, high = (float(bound) for bound in np.quantile(positive, (0.02, 0.98)))
    span = max(np.log(high / low), 1e-9)
    colors = colormaps[HEAT]

    def cell(column: int, value: float) -> Cell:
        part = float(np.clip(np.log(max(value, low) / low) / span, 0, 1))
        color = to_hex(colors(DARKEST + (LIGHTEST - DARKEST) * part))
        return Cell(column, color, f"step {column}: {value:.2%} changed")

    rows = [
        HeatRow(*_place(name), tuple(cell(column, value) for column, value in enumerate(row) if not np.isnan(value)))
        for name, row in zip(known.sites, values, strict=True)
    ]
    return tuple(rows), (low, high)


def _place(site: str) -> tuple[str, str]:
    """ "transformer_blocks.3 [1, 64, 128]" as group and name: "transformer_blocks", "3 [1, 64, 128]"."""
    owner, space, shape = site.partition(" ")
    group, _, index = owner.rpartition(".")
    return group, f"{index}{space}{shape}"


def heat_scale(count: int = 24) -> tuple[str, ...]:
    """Colours from the smallest change to the largest."""
    return tuple(to_hex(colormaps[HEAT](each)) for each in np.linspace(DARKEST, LIGHTEST, count))


def _times(profile: Profile, result: EvaluationResult) -> tuple[TimeRow, ...]:
    """Fewest recompute steps first, and none for budgets of an earlier run of the same evaluation."""
    shown = {line.budget for line in result.lines} | {result.num_steps}
    return tuple(
        TimeRow(
            budget,
            timed.total,
            timed.spread,
            tuple(1000 * each for each in timed.steps),
            tuple(step in timed.recompute_steps for step in range(len(timed.steps))),
            1000 * max(0.0, timed.total - sum(timed.steps)),
        )
        for budget, timed in sorted(profile.budgets.items())
        if budget in shown
    )
