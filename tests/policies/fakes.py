"""Stand-ins for what policies look at."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from recache_compile.ir.schedule import Schedule
from recache_compile.policies.base import Calibration


@dataclass
class FakeObjective:
    """A loss that is a function of the mask, and noise that is a function of mask and sample.

    Args:
        loss: of a mask (T,) of zeros and ones.
        held_out_loss: the same for the held-out samples; without it they are like the others.
        noise: standard deviation of what a sample adds to one schedule.
        common: standard deviation of what a sample adds to all schedules alike.
    """

    loss: Callable[[np.ndarray], float]
    held_out_loss: Callable[[np.ndarray], float] | None = None
    noise: float = 0.0
    common: float = 0.0
    training: tuple[int, ...] = (0, 1, 2)
    held_out: tuple[int, ...] = (1000, 1001)
    batch_size: int = 4
    calls: list[tuple[tuple[Schedule, ...], tuple[int, ...]]] = field(default_factory=list)

    def losses(self, schedules: Sequence[Schedule], batches: Sequence[int]) -> np.ndarray:
        assert set(batches) <= {*self.training, *self.held_out}
        self.calls.append((tuple(schedules), tuple(batches)))
        rows = [np.concatenate([self._of(schedule, batch) for batch in batches]) for schedule in schedules]
        return np.array(rows).reshape(len(schedules), len(batches) * self.batch_size)

    @property
    def generations(self) -> int:
        """Distinct pairs of schedule and sample that were asked."""
        pairs = {(each, batch) for schedules, batches in self.calls for each in schedules for batch in batches}
        return len(pairs) * self.batch_size

    @property
    def asked(self) -> set[Schedule]:
        """Schedules that ran at all."""
        return {each for schedules, _ in self.calls for each in schedules}

    def mean(self, schedule: Schedule) -> float:
        """The mean loss on all training samples; not counted as asked."""
        return float(np.mean([self._of(schedule, batch) for batch in self.training]))

    def _of(self, schedule: Schedule, batch: int) -> np.ndarray:
        loss = self.held_out_loss if self.held_out_loss and batch in self.held_out else self.loss
        common = np.random.default_rng((1, batch)).normal(size=self.batch_size)
        own = np.random.default_rng((2, batch, int(schedule.mask, 2))).normal(size=self.batch_size)
        return loss(mask_of(schedule)) + self.common * common + self.noise * own


def mask_of(schedule: Schedule) -> np.ndarray:
    """The mask (T,) in floating point."""
    return np.array([float(bit) for bit in schedule.mask])


def separable(num_steps: int, seed: int = 0) -> Callable[[np.ndarray], float]:
    """A positive loss to which every cached step adds an amount of its own."""
    weights = np.random.default_rng((seed, num_steps)).uniform(0.1, 1, num_steps)
    return lambda mask: float(weights @ (1 - mask)) + 0.1


def pairwise(num_steps: int, seed: int = 0, strength: float = 0.1) -> Callable[[np.ndarray], float]:
    """A positive loss: amounts of every cached step, and of every pair of neighbouring ones."""
    alone = separable(num_steps, seed)
    pairs = strength * np.random.default_rng((seed, 1)).uniform(0, 1, num_steps - 1)
    return lambda mask: alone(mask) + float(pairs @ ((1 - mask[1:]) * (1 - mask[:-1])))


def away_from(schedule: Schedule) -> Callable[[np.ndarray], float]:
    """One more than the number of steps in which a mask differs from a schedule."""
    wanted = mask_of(schedule)
    return lambda mask: 1 + float(np.abs(mask - wanted).sum())


def trajectories(num_steps: int, samples: int = 3, size: int = 7, seed: int = 0) -> np.ndarray:
    """Predictions (samples, T, size) of smooth motions with a little noise."""
    random = np.random.default_rng((seed, num_steps))
    time = np.linspace(0, 1, num_steps)[:, None, None]
    speeds, shifts, noise = (
        random.uniform(1, 4, (samples, size)),
        random.normal(size=(samples, size)),
        random.normal(size=(num_steps, samples, size)),
    )
    return np.moveaxis(np.sin(time * speeds + shifts) + 0.02 * noise, 1, 0)


def calibration_of(predictions: np.ndarray, step_sizes: np.ndarray | None = None) -> Calibration:
    """What is known of trajectories (samples, T, size), features being predictions."""
    num_steps = predictions.shape[1]
    grams = np.einsum("sad,sbd->sab", predictions, predictions)
    sizes = np.full(num_steps, -1 / num_steps) if step_sizes is None else step_sizes
    return Calibration(grams, grams, sizes, np.zeros(num_steps), np.ones(num_steps))
