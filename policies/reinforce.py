"""Train ReCache's logits: by REINFORCE on the true loss, or by likelihood of schedules known to be good."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from recache_compile.errors import ScheduleError
from recache_compile.ir.schedule import Schedule
from recache_compile.policies.base import Objective, Problem, Progress, check_options
from recache_compile.policies.plackett_luce import entropy, ordered_log_probability, sample, set_log_probability
from recache_compile.policies.recache import Logits, ReCache, most_likely
from recache_compile.policies.uniform import Uniform

Likelihood = Literal["set", "ordered"]
LIKELIHOODS = {"set": set_log_probability, "ordered": ordered_log_probability}


@dataclass(frozen=True, slots=True)
class Reinforce:
    """Policy gradient on schedules of common noise (ReCache, arXiv 2606.06060).

    An iteration draws a budget k, n schedules by Gumbel-top-k and a batch of samples that
    they share.  With L_reg = L / s + entropy * log p and the leave-one-out baseline, the
    gradient is 1 / (n - 1) sum_i (L_reg,i - mean) grad log p_i.  The scale s is the standard
    deviation of the n losses, so that no budget drowns the others and no unit matters.

    Args:
        iterations: updates.
        schedules: n, drawn in each iteration.
        rate: Adam's learning rate.
        entropy: weight of log p in the loss.
        likelihood: "set" (order does not matter) or "ordered".
        width: of the network; 0 for logits that do not depend on the budget.
        every: iterations between two validations on the held-out samples.
    """

    iterations: int = 400
    schedules: int = 8
    rate: float = 0.005
    entropy: float = 0.1
    likelihood: Likelihood = "set"
    width: int = 64
    every: int = 50

    def __post_init__(self) -> None:
        least = {"iterations": 1, "schedules": 2, "rate": 0, "entropy": 0, "width": 0, "every": 1}
        check_options("recache", least, self)
        if self.likelihood not in LIKELIHOODS:
            raise ScheduleError(f"policy recache: likelihood {self.likelihood!r}: choose {' or '.join(LIKELIHOODS)}")

    def scaled(self, effort: float) -> "Reinforce":
        """The same with `effort` times as many iterations."""
        return replace(self, iterations=max(1, round(self.iterations * effort)))

    def reports(self, budgets: int) -> int:
        """How many times progress is reported, whatever the number of budgets."""
        return self.iterations

    def schedule(self, problem: Problem, budget: int) -> Schedule:
        """Train for one budget alone."""
        return self.train(problem, (budget,)).schedule(problem, budget)

    def train(self, problem: Problem, budgets: Sequence[int], start: Logits | None = None) -> ReCache:
        """Train one policy for all budgets, from scratch or from `start`.

        The network with the lowest held-out loss of its most likely schedules, validated
        every few iterations, is returned; without held-out batches, the last one.

        Raises:
            ScheduleError: there is no objective.
        """
        objective = problem.need_objective("recache")
        logits = start or new_logits(problem, self.width)
        best = copy.deepcopy(logits)
        optimizer = torch.optim.Adam(logits.parameters(), lr=self.rate)
        generator = torch.Generator().manual_seed(problem.seed)
        uniform = {k: _mean(objective, Uniform().schedule(problem, k), objective.training[:1]) for k in budgets}
        scales = {k: abs(value) or 1.0 for k, value in uniform.items()}
        lowest = _validation(best, objective, scales)
        for iteration in range(self.iterations):
            budget = budgets[int(torch.randint(len(budgets), (), generator=generator))]
            batch = objective.training[int(torch.randint(len(objective.training), (), generator=generator))]
            loss = self._step(logits, optimizer, generator, objective, budget, batch)
            mode = most_likely(logits, budget)
            problem.report(Progress("reinforce", budget, mode, loss, entropy(logits(budget)).item()))
            if (iteration + 1) % self.every == 0 or iteration + 1 == self.iterations:
                value = _validation(logits, objective, scales)
                if value <= lowest:
                    best, lowest = copy.deepcopy(logits), value
        return ReCache(best)

    @torch.enable_grad()
    def _step(
        self,
        logits: Logits,
        optimizer: torch.optim.Optimizer,
        generator: torch.Generator,
        objective: Objective,
        budget: int,
        batch: int,
    ) -> float:
        """One update; returns the mean loss of the schedules drawn."""
        theta = logits(budget)
        items = sample(theta, budget - 1, self.schedules, generator)
        drawn = [Schedule((0, *steps), logits.num_steps) for steps in (items + 1).tolist()]
        losses = torch.from_numpy(objective.losses(drawn, (batch,)).mean(1))
        log_p = LIKELIHOODS[self.likelihood](theta, items)
        optimizer.zero_grad()
        leave_one_out(losses / (float(losses.std()) or 1.0), log_p, self.entropy).backward()
        optimizer.step()
        return float(losses.mean())


def leave_one_out(losses: Tensor, log_p: Tensor, entropy_weight: float) -> Tensor:
    """A value whose gradient is the REINFORCE estimate with the leave-one-out baseline.

    Args:
        losses: of the n schedules (n,).
        log_p: their log-probabilities (n,), which the gradient flows through.
        entropy_weight: of log p in the loss.
    """
    regular = losses + entropy_weight * log_p.detach()
    return ((regular - regular.mean()) * log_p).sum() / max(1, len(losses) - 1)


@torch.enable_grad()
def fit(
    logits: Logits,
    evaluated: Mapping[int, Mapping[Schedule, float]],
    others: Sequence[Schedule] = (),
    iterations: int = 600,
    rate: float = 0.01,
    sharpness: float = 30.0,
    kept: int = 8,
) -> Logits:
    """Weighted maximum likelihood of schedules that were evaluated, ending on the best of each budget.

    A schedule of loss L weighs exp(-sharpness (L / L_best - 1)).  After two thirds of the
    iterations it sees the best schedules alone, until they are the most likely ones: at most
    twice as long as it was asked.

    Args:
        logits: changed in place.
        evaluated: by budget, the schedules and their training losses.
        others: one schedule for each of some other budgets.
        iterations: at most.
        rate: Adam's learning rate.
        sharpness: how fast weights fall with the relative loss.
        kept: schedules of each budget that count, the best ones.
    """
    best = {budget: min(losses, key=lambda each: losses[each]) for budget, losses in evaluated.items()}
    alone = [(schedule,) for schedule in (*best.values(), *others)]
    ranked = [tuple(sorted(losses, key=lambda each: losses[each])[:kept]) for losses in evaluated.values()]
    broad = [*ranked, *((schedule,) for schedule in others)]
    optimizer = torch.optim.Adam(logits.parameters(), lr=rate)
    for iteration in range(2 * iterations):
        late = iteration >= 2 * iterations // 3
        if late and all(most_likely(logits, budget) == schedule for budget, schedule in best.items()):
            break
        optimizer.zero_grad()
        total = torch.zeros((), dtype=torch.float64)
        for schedules in alone if late else broad:
            budget = schedules[0].budget
            values = np.array([evaluated.get(budget, {}).get(schedule, 1.0) for schedule in schedules])
            excess = (values - values.min()) / (abs(values.min()) or 1.0)
            weights = torch.softmax(torch.from_numpy(-sharpness * excess), 0)
            items = torch.tensor([schedule.recompute_steps[1:] for schedule in schedules]) - 1
            total = total - (weights * set_log_probability(logits(budget), items, nodes=64)).sum()
        total.backward()
        optimizer.step()
    return logits


def new_logits(problem: Problem, width: int) -> Logits:
    """An untrained network, its random weights from the problem's seed; its last layer starts small."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(problem.seed)
        logits = Logits(problem.num_steps, width)
    if logits.layers is not None:
        with torch.no_grad():
            for parameter in logits.layers[-1].parameters():
                parameter.mul_(0.1)
    return logits


def _mean(objective: Objective, schedule: Schedule, batches: Sequence[int]) -> float:
    return float(objective.losses([schedule], batches).mean())


def _validation(logits: Logits, objective: Objective, scales: Mapping[int, float]) -> float:
    """Mean of the held-out losses of the most likely schedules, by budget in units of `scales`."""
    if not objective.held_out:
        return 0.0
    losses = [_mean(objective, most_likely(logits, k), objective.held_out) / scale for k, scale in scales.items()]
    return float(np.mean(losses))
