"""ReCache (arXiv 2606.06060): a learned distribution over schedules, one for every budget."""

import json
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from recache_compile.errors import ScheduleError
from recache_compile.ir.carry_over import carry_over
from recache_compile.ir.schedule import Schedule
from recache_compile.policies.base import Problem
from recache_compile.support.files import writing

FORMAT_VERSION = 1
FACTS = "policy.json"
WEIGHTS = "policy.safetensors"
HARMONICS = 4


class Logits(nn.Module):
    """theta = MLP(k): a logit for every step but the first, given the budget.

    Args:
        num_steps: length T of the denoising loop.
        width: of the two hidden layers; 0 for logits that do not depend on the budget.
    """

    def __init__(self, num_steps: int, width: int = 64) -> None:
        super().__init__()
        self.num_steps, self.width = num_steps, width
        self.bias = nn.Parameter(torch.zeros(num_steps - 1))
        inputs = 2 + 2 * HARMONICS
        self.layers = nn.Sequential(
            nn.Linear(inputs, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, num_steps - 1)
        ) if width else None  # fmt: skip

    def forward(self, budget: int) -> Tensor:
        """Logits (T - 1,) of the steps 1..T-1."""
        if self.layers is None:
            return self.bias
        share = budget / self.num_steps
        angles = [math.pi * 2**number * share for number in range(HARMONICS)]
        waves = [wave(angle) for angle in angles for wave in (math.sin, math.cos)]
        inputs = torch.tensor([share, math.log(budget) / math.log(self.num_steps), *waves])
        return self.bias + self.layers(inputs)


@dataclass(frozen=True, slots=True, eq=False)
class ReCache:
    """A trained policy: the k steps with the largest logits, and no noise.

    Args:
        logits: the trained network.
        facts: where it comes from: model, forecaster, order, granularity, budgets, losses, noise levels.
        source: for messages.
    """

    logits: Logits
    facts: Mapping[str, Any] = field(default_factory=dict)
    source: str = "recache"

    def schedule(self, problem: Problem, budget: int) -> Schedule:
        """Step 0 and the `budget - 1` likeliest others.

        For a loop of another length these go to the nearest noise levels, with a warning.
        """
        trained = self.logits.num_steps
        self._warn(problem, min(budget, trained))
        schedule = most_likely(self.logits, min(budget, trained))
        if problem.num_steps == trained:
            return schedule
        warnings.warn(
            f"policy {self.source}: trained for {trained} steps, its schedule is carried over to {problem.num_steps};"
            " train one for them where quality matters",
            stacklevel=3,
        )
        levels = tuple(self.facts.get("levels", ()))
        return carry_over(schedule, budget, problem.num_steps, levels, problem.levels)

    def _warn(self, problem: Problem, budget: int) -> None:
        """Say where the policy is used for something else than it was trained for."""
        trained = {name: self.facts.get(name) for name in ("forecaster", "order")}
        if problem.forecaster is not None and None not in trained.values():
            used = {"forecaster": problem.forecaster.name, "order": problem.forecaster.order}
            if used != trained:
                kinds = [f"{each['forecaster']} of order {each['order']}" for each in (trained, used)]
                warnings.warn(f"policy {self.source}: trained for {kinds[0]}, used with {kinds[1]}", stacklevel=3)
        budgets = self.facts.get("schedules", {str(budget): ()})
        if str(budget) not in budgets:
            warnings.warn(
                f"policy {self.source}: not trained for budget {budget}, only for {', '.join(budgets)}", stacklevel=3
            )

    def save(self, folder: Path) -> None:
        """Write `policy.safetensors` and `policy.json`."""
        folder.mkdir(parents=True, exist_ok=True)
        with writing(folder / WEIGHTS) as partial:
            save_file({name: value.contiguous() for name, value in self.logits.state_dict().items()}, partial)
        shape = {"format_version": FORMAT_VERSION, "num_steps": self.logits.num_steps, "width": self.logits.width}
        with writing(folder / FACTS) as partial:
            partial.write_text(json.dumps({**shape, **self.facts, **shape}, indent=1) + "\n", encoding="utf-8")


@torch.no_grad()
def most_likely(logits: Logits, budget: int) -> Schedule:
    """The mode by argtopk: step 0 and the steps with the `budget - 1` largest logits."""
    steps = logits(budget).topk(budget - 1).indices + 1
    return Schedule((0, *steps.tolist()), logits.num_steps)


def is_trained(folder: Path) -> bool:
    """Whether this is the folder of a trained policy, or the JSON file in one."""
    if folder.name == FACTS and folder.is_file():
        return (folder.parent / WEIGHTS).is_file()  # another policy.json may hold schedules
    return (folder / FACTS).is_file()


def read_policy(folder: Path) -> ReCache:
    """Read what `ReCache.save` wrote; nothing is unpickled.

    Raises:
        ScheduleError: a file is missing, damaged or from a newer version.
    """
    folder = folder.parent if folder.name == FACTS else folder
    try:
        facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        version = facts["format_version"]
        if version > FORMAT_VERSION:
            raise ScheduleError(
                f"{folder}: format {version}, this version reads {FORMAT_VERSION}; upgrade recache-compile"
            )
        with torch.device("meta"):  # takes no memory and no random numbers
            logits = Logits(int(facts["num_steps"]), int(facts["width"]))
        weights = {name: value.float() for name, value in load_file(folder / WEIGHTS).items()}
        logits.load_state_dict(weights, assign=True)
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RuntimeError, SafetensorError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ScheduleError(f"{folder}: no trained policy ({reason}); train it again") from None
    if not all(bool(value.isfinite().all()) for value in logits.state_dict().values()):
        raise ScheduleError(f"{folder}: damaged (a weight is not finite); train it again")
    return ReCache(logits.eval(), facts, str(folder))
