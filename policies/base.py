"""What a policy is: a rule from a problem and a budget to a schedule."""

from dataclasses import dataclass
from typing import Protocol

from recache_compile.schedule import Schedule


@dataclass(frozen=True, slots=True)
class Problem:
    """What a policy may look at.

    Args:
        num_steps: length T of the denoising loop.
    """

    num_steps: int


class Policy(Protocol):
    """A rule that spends a budget."""

    def schedule(self, problem: Problem, budget: int) -> Schedule:
        """The schedule for one budget: exactly `budget` recompute steps, step 0 among them."""
        ...
