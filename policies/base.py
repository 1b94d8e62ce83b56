"""What a policy is: a rule from a problem and a budget to a schedule."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from typing import Protocol

import numpy as np

from recache_compile.errors import ScheduleError
from recache_compile.ir.forecasters import Forecaster
from recache_compile.ir.schedule import Schedule, check_budgets


@dataclass(frozen=True, slots=True, eq=False)
class Calibration:
    """What a few uncached generations tell about a model; arrays in float64.

    Args:
        predictions: Gram matrices of the model's predictions over the steps, one for each
            sample (samples, T, T); guidance branches are added up.
        features: the same of the cached features, sites added up (samples, T, T).
        step_sizes: change of the noise level in each step (T,), from the scheduler.
        changes: mean |F_t - F_(t-1)| / mean |F_(t-1)| of the cached features (T,), the
            quantity TeaCache's polynomial stands for; 0 at t = 0.
        ratios: mean over tokens of ||F_t|| / ||F_(t-1)|| (T,), MagCache's magnitude ratio;
            1 at t = 0.
    """

    predictions: np.ndarray
    features: np.ndarray
    step_sizes: np.ndarray
    changes: np.ndarray
    ratios: np.ndarray

    @property
    def num_steps(self) -> int:
        """Length T of the denoising loop."""
        return self.predictions.shape[-1]

    @property
    def gram(self) -> list[list[float]]:
        """What the forecaster `fitted` is fitted to: the Gram matrix (T, T) of the features of all samples."""
        return self.features.sum(0).tolist()


class Objective(Protocol):
    """The loss of schedules on fixed samples, by running the model.

    Samples come in batches of one size, so that results do not depend on how they are asked
    for.  Some batches are for choosing schedules, the others for accepting what was trained.
    """

    @property
    def training(self) -> tuple[int, ...]:
        """Numbers of the batches that schedules are chosen on."""
        ...

    @property
    def held_out(self) -> tuple[int, ...]:
        """Numbers of the batches that what was trained is validated and accepted on."""
        ...

    @property
    def batch_size(self) -> int:
        """Samples in a batch."""
        ...

    def losses(self, schedules: Sequence[Schedule], batches: Sequence[int]) -> np.ndarray:
        """Loss of every schedule on every sample (schedules, batches * batch_size), lower is better.

        Each distinct pair of schedule and sample is one generation; asking again is free.
        """
        ...


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a search is.

    Args:
        stage: what it is doing ("race", "climb", "fit", "reinforce").
        budget: that it is doing it for.
        schedule: the best one so far; the most likely one, while a distribution is trained.
        loss: of that schedule, the mean over the training samples seen so far; of the
            schedules that were drawn, while a distribution is trained.
        entropy: of the policy's first choice, in nats, where a distribution is trained.
    """

    stage: str
    budget: int
    schedule: Schedule
    loss: float
    entropy: float | None = None


@dataclass(frozen=True, slots=True)
class Problem:
    """What a policy may look at.

    Args:
        num_steps: length T of the denoising loop.
        forecaster: fills the cached steps.
        calibration: of the model; None where it was not run.
        objective: the true loss; None where it cannot be asked.
        seed: of everything random.
        report: told about the progress of searches.
        levels: noise level of every step, where known.
    """

    num_steps: int
    forecaster: Forecaster | None = None
    calibration: Calibration | None = None
    objective: Objective | None = None
    seed: int = 0
    report: Callable[[Progress], None] = lambda progress: None
    levels: tuple[float, ...] = ()

    def need_forecaster(self, policy: str) -> Forecaster:
        """The forecaster.

        Raises:
            ScheduleError: there is none.
        """
        if self.forecaster is None:
            raise ScheduleError(f"policy {policy}: needs a forecaster")
        return self.forecaster

    def need_calibration(self, policy: str) -> Calibration:
        """The calibration.

        Raises:
            ScheduleError: there is none.
        """
        if self.calibration is None:
            raise ScheduleError(
                f"policy {policy}: needs a few uncached generations of the model; compile a pipeline, not a module, or"
                " choose a policy that looks at nothing, such as uniform"
            )
        return self.calibration

    def need_objective(self, policy: str) -> Objective:
        """The objective.

        Raises:
            ScheduleError: there is none.
        """
        if self.objective is None:
            raise ScheduleError(f"policy {policy}: searches on the true loss; use `recache-compile train` for it")
        return self.objective


class Policy(Protocol):
    """A rule that spends a budget.

    One that looks at nothing but the number of steps has a true attribute `for_any_length`.
    """

    def schedule(self, problem: Problem, budget: int) -> Schedule:
        """The schedule for one budget: exactly `budget` recompute steps, step 0 among them."""
        ...


def check_options(policy: str, least: Mapping[str, float], options: object) -> None:
    """Raise unless a policy's options are finite and not too small.

    Args:
        policy: its name.
        least: the smallest value that makes sense, by option.
        options: has them as attributes.
    """
    for name, smallest in least.items():
        value = getattr(options, name)
        if not smallest <= value < inf:
            raise ScheduleError(f"policy {policy}: {name} {value}: expected {smallest} or more")


def make_schedules(policy: Policy, budgets: Iterable[int], problem: Problem) -> dict[int, Schedule]:
    """One schedule a budget, each checked to cost exactly what was asked.

    Raises:
        ScheduleError: a budget is not usable, or the policy broke its promise.
    """
    schedules = {}
    for budget in check_budgets(budgets, problem.num_steps):
        schedule = policy.schedule(problem, budget)
        if schedule.budget != budget or schedule.num_steps != problem.num_steps:
            raise ScheduleError(f"policy {policy}: gave {schedule} for budget {budget} and {problem.num_steps} steps")
        schedules[budget] = schedule
    return schedules
