"""A guess at the end error of schedules from a few uncached generations, without running the model."""

from collections.abc import Sequence

import numpy as np

from recache_compile.ir.forecasters import Forecaster
from recache_compile.ir.schedule import Schedule
from recache_compile.policies.base import Calibration


class Surrogate:
    """E(S) = mean over samples of sqrt(c G c'), the distance that the predictions' errors add up to.

    With predictions v and a linear solver, the latents end at x_0 + sum_t dsigma_t v_t, so
    that a schedule whose forecasts are v~ = W v moves the end by c v with
    c = dsigma' (W - I); G is the Gram matrix of v.  Errors may cancel, which sums of errors
    of single steps cannot see.  The forecasts are taken along the uncached trajectory.

    Args:
        calibration: Gram matrices and step sizes.
        forecaster: fills the cached steps.
    """

    def __init__(self, calibration: Calibration, forecaster: Forecaster) -> None:
        self._grams = calibration.predictions
        self._sizes = calibration.step_sizes
        self._steps = calibration.num_steps
        self._forecaster = forecaster
        self._segments: dict[tuple[int, ...], np.ndarray] = {}

    def errors(self, schedules: Sequence[Schedule]) -> np.ndarray:
        """E of every schedule (schedules,)."""
        weights = np.stack([self._weights(schedule.recompute_steps) for schedule in schedules])
        squares = [((weights @ gram) * weights).sum(1) for gram in self._grams]
        return np.sqrt(np.maximum(squares, 0)).mean(0)

    def _weights(self, anchors: tuple[int, ...]) -> np.ndarray:
        """The vector c (T,) of a schedule."""
        total = np.zeros(self._steps)
        held = self._forecaster.order + 1
        for number, anchor in enumerate(anchors):
            until = anchors[number + 1] if number + 1 < len(anchors) else self._steps
            among = anchors[max(0, number + 1 - held) : number + 1]
            total[list(among)] += self._segment(among)[until - anchor - 1]
            total[anchor + 1 : until] -= self._sizes[anchor + 1 : until]
        return total

    def _segment(self, anchors: tuple[int, ...]) -> np.ndarray:
        """Weights of the anchors, oldest first, summed over the cached steps after them (steps, anchors).

        SitePattern n is the sum over n cached steps.
        """
        if anchors not in self._segments:
            later = range(anchors[-1] + 1, self._steps)
            rows = [self._sizes[step] * np.array(self._forecaster.coefficients(anchors, step))[::-1] for step in later]
            self._segments[anchors] = np.cumsum([np.zeros(len(anchors)), *rows], 0)
        return self._segments[anchors]
