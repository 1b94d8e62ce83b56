"""From judged batches to the lines of a result."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from recache_compile.compiler.compiled import Compiled
from recache_compile.evaluation.metrics import METRICS
from recache_compile.evaluation.profile import Profile
from recache_compile.evaluation.result import EvaluationLine
from recache_compile.evaluation.runner import Values
from recache_compile.evaluation.setting import Setting
from recache_compile.evaluation.statistics import (
    Estimate,
    distance_of_sets,
    mean,
    relative_loss,
    relative_loss_of_sets,
    verdict,
)
from recache_compile.ir.schedule import Schedule


@dataclass(frozen=True, slots=True)
class Reference:
    """The set that a Frechet distance is to.

    Args:
        name: what it is.
        features: (pictures, features).
        is_real: whether it stands for what the model should draw.  To other samples of the
            model itself the true distance is zero, and what is measured is what the number of
            samples makes of it: no loss can be seen beside that.
    """

    name: str
    features: np.ndarray
    is_real: bool

    def shows_loss(self, samples: int) -> bool:
        """Whether so many samples are enough: more than there are features, without which covariances are singular."""
        return self.is_real and min(samples, len(self.features)) > self.features.shape[1]


Columns = Mapping[str, np.ndarray]
"""By metric: values (samples,) or features (samples, features)."""


def estimates(
    setting: Setting,
    schedules: Mapping[str, Mapping[int, Schedule]],
    judged: Sequence[Values],
    reference: Reference | None,
    compiled: Compiled,
    times: Profile,
) -> tuple[dict[str, Estimate], tuple[EvaluationLine, ...]]:
    """Values of the uncached samples, and the line of every policy at every budget.

    Args:
        setting: what was evaluated.
        schedules: by policy and budget.
        judged: the values of every batch.
        reference: the reference set, where a metric is about sets.
        compiled: the engines.
        times: of the uncached pipeline and of every budget.
    """
    uncached = _columns(judged, setting.uncached, setting.metrics)
    lines = []
    for policy, of_policy in schedules.items():
        costs = compiled.engines.with_plans(of_policy, compiled.forecaster)
        for budget, schedule in of_policy.items():
            cost, cached = costs.cost(budget), _columns(judged, schedule.mask, setting.metrics)
            losses = _losses(cached, uncached, reference)
            speedup = times.speedup(budget)
            lines.append(
                EvaluationLine(
                    policy=policy,
                    budget=budget,
                    recompute_steps=schedule.recompute_steps,
                    macs_reduction=cost.macs_reduction,
                    speedup=speedup,
                    seconds=times.budgets[budget].total,
                    history_bytes=cost.history_bytes,
                    table_bytes=cost.table_bytes,
                    values=_values(cached, setting.metrics, reference),
                    losses=losses,
                    target=verdict(
                        cost.macs_reduction, speedup, list(losses.values()), len(judged) * setting.batch_size
                    ),
                )
            )
    return _values(uncached, setting.metrics, reference), tuple(lines)


def features_in(judged: Sequence[Values], mask: str) -> np.ndarray:
    """Features (samples, features) of the samples of batches."""
    return _columns(judged, mask, ("fid",))["fid"]


def _columns(judged: Sequence[Values], mask: str, metrics: Sequence[str]) -> dict[str, np.ndarray]:
    """Those of the metrics that this mask has values of."""
    names = [name for name in metrics if name in judged[0][mask]]
    return {name: torch.cat([each[mask][name] for each in judged]).double().numpy() for name in names}


def _values(columns: Columns, metrics: Sequence[str], reference: Reference | None) -> dict[str, Estimate]:
    """One estimate for each metric that was asked for."""
    found = {}
    for name in metrics:
        if name in columns and METRICS[name].against != "set":
            found[name] = mean(columns[name])
        elif name in columns and reference is not None and min(len(columns[name]), len(reference.features)) > 1:
            found[name] = distance_of_sets(columns[name], reference.features)
    return found


def _losses(cached: Columns, uncached: Columns, reference: Reference | None) -> dict[str, Estimate]:
    """By how much those metrics that count are worse than uncached."""
    found = {}
    for name, metric in METRICS.items():
        if not metric.counts or name not in cached:
            continue
        if metric.against != "set":
            loss = relative_loss(cached[name], uncached[name], metric.higher)
        elif reference is not None and reference.shows_loss(len(cached[name])):
            loss = relative_loss_of_sets(cached[name], uncached[name], reference.features)
        else:
            loss = None
        if loss is not None:
            found[name] = loss
    return found
