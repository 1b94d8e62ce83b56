"""Racing: many schedules on few samples, few schedules on all of them."""

from collections.abc import Sequence

import numpy as np

from recache_compile.ir.schedule import Schedule
from recache_compile.policies.base import Objective


def race(candidates: Sequence[Schedule], objective: Objective, keep: int = 4) -> list[tuple[Schedule, float]]:
    """Successive halving (Maron and Moore, 1993; Karnin et al., 2013): on 1, 2, 4, ... batches, then on all.

    After each of these the better ones stay: as many as are within two standard errors of
    the best (by the paired difference), but at most half and at least `keep` of them.

    Returns:
        Those that have run on all batches, best first, with their mean losses.
    """
    left = list(dict.fromkeys(candidates))
    batches = objective.training
    number = 1
    while True:
        number = len(batches) if len(left) <= keep else min(number, len(batches))
        losses = objective.losses(left, batches[:number])
        order = np.argsort(losses.mean(1), kind="stable")
        left, losses = [left[at] for at in order], losses[order]
        if number == len(batches):
            return [(schedule, float(value)) for schedule, value in zip(left, losses.mean(1), strict=True)]
        difference = losses - losses[:1]
        samples = losses.shape[1]
        error = difference.std(1, ddof=1) / np.sqrt(samples) if samples > 1 else np.inf  # one tells nothing
        close = int((difference.mean(1) <= 2 * error).sum())
        left = left[: max(min(keep, len(left)), min(close, (len(left) + 1) // 2))]
        number *= 2
