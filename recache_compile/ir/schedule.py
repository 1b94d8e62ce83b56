"""Recompute schedules: which k of the T denoising steps run the transformer in full."""

from collections.abc import Iterable
from dataclasses import dataclass

from recache_compile.errors import ScheduleError


@dataclass(frozen=True, slots=True)
class Schedule:
    """The sorted set of recompute steps of one generation.

    Args:
        recompute_steps: step indices in 0..num_steps-1; step 0 is always among them,
            because nothing can be forecast before something was computed.
        num_steps: length T of the denoising loop.

    Raises:
        ScheduleError: steps repeat, lie outside the loop or leave out step 0.
    """

    recompute_steps: tuple[int, ...]
    num_steps: int

    def __post_init__(self) -> None:
        steps = self.recompute_steps
        if any(isinstance(step, bool) or not isinstance(step, int) for step in steps):
            raise ScheduleError(f"schedule {list(steps)}: steps are whole numbers")
        if len(set(steps)) != len(steps):
            raise ScheduleError(f"schedule {list(steps)}: a step is repeated; name each once")
        outside = [step for step in steps if not 0 <= step < self.num_steps]
        if outside:
            raise ScheduleError(f"schedule {list(steps)}: {outside} outside 0..{self.num_steps - 1}")
        if 0 not in steps:
            raise ScheduleError(f"schedule {list(steps)}: step 0 is missing; the first step is always recomputed")
        object.__setattr__(self, "recompute_steps", tuple(sorted(steps)))

    @property
    def budget(self) -> int:
        """k, the number of recompute steps."""
        return len(self.recompute_steps)

    @property
    def mask(self) -> str:
        """One character a step: 1 recompute, 0 cached."""
        steps = set(self.recompute_steps)
        return "".join("1" if step in steps else "0" for step in range(self.num_steps))

    def starting_at(self, step: int) -> "Schedule":
        """The rest of the schedule for a generation that begins with `step`, which is then recomputed.

        Steps are counted from there.

        Raises:
            ScheduleError: there is no such step.
        """
        if not 0 <= step < self.num_steps:
            raise ScheduleError(f"start {step}: expected 0..{self.num_steps - 1}")
        later = tuple(each - step for each in self.recompute_steps if each > step)
        return Schedule((0, *later), self.num_steps - step)

    @classmethod
    def every(cls, num_steps: int) -> "Schedule":
        """Every step recomputed: an uncached generation."""
        return cls(tuple(range(num_steps)), num_steps)

    @classmethod
    def from_mask(cls, mask: str | Iterable[int]) -> "Schedule":
        """Read a 0/1 mask: a string, or numbers as in cache-dit's `steps_computation_mask`."""
        bits = [str(bit) for bit in mask]
        wrong = sorted(set(bits) - {"0", "1"})
        if wrong:
            raise ScheduleError(f"mask {''.join(bits)!r}: only 0 and 1 are allowed, found {wrong}")
        return cls(tuple(step for step, bit in enumerate(bits) if bit == "1"), len(bits))


def budget_of(budget: float, num_steps: int) -> int:
    """The number of recompute steps k that a budget is in a loop.

    Args:
        budget: that number, or a share of the steps: 0.2 is one in five, rounded, at least one.
        num_steps: length T of the loop; with a larger budget every step of it is recomputed.

    Raises:
        ScheduleError: it is neither.
    """
    if isinstance(budget, float) and 0 < budget <= 1:
        return max(1, round(budget * num_steps))
    if isinstance(budget, bool) or not isinstance(budget, int) or budget < 1:
        raise ScheduleError(
            f"budget {budget!r}: a budget is a whole number of steps from 1 on, or a share of them from 0.0 to 1.0"
        )
    return min(budget, num_steps)


def check_budgets(budgets: Iterable[int | float], num_steps: int) -> tuple[int, ...]:
    """The budgets as whole numbers in 1..T, none of them repeated; shares of the steps count as `budget_of` says."""
    if not isinstance(budgets, Iterable) or isinstance(budgets, str):
        raise ScheduleError(f"budgets {budgets!r}: expected several whole numbers, as in (5, 10, 15)")
    if num_steps < 1:
        raise ScheduleError(f"steps {num_steps}: a generation has at least one step")
    checked = tuple(budget_of(each, num_steps) if isinstance(each, float) else each for each in budgets)
    if not checked:
        raise ScheduleError("budgets: none given; name at least one, as in 5,10,15")
    for budget in checked:
        if isinstance(budget, bool) or not isinstance(budget, int):
            raise ScheduleError(f"budget {budget!r}: a budget is a whole number of steps")
        if not 1 <= budget <= num_steps:
            raise ScheduleError(f"budget {budget}: expected 1..{num_steps}, the number of steps")
    if len(set(checked)) != len(checked):
        raise ScheduleError(f"budgets {list(checked)}: one is repeated; name each once")
    return checked
