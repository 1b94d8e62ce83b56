"""What compiling returns and loading restores."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from recache_compile.capture import Signature
from recache_compile.cost import Cost, cost_of
from recache_compile.errors import DispatchError
from recache_compile.plan import Plan
from recache_compile.runtimes.base import Variant
from recache_compile.runtimes.dispatcher import Dispatcher
from recache_compile.schedule import Schedule


@dataclass(frozen=True, slots=True)
class Description:
    """What was compiled, for people and for the manifest.

    Args:
        model: name, folder or Hub id of the model; its class name when a module was given.
        model_class: qualified name of the module's class.
        config: the module's configuration, where it has one.
        num_steps: length T of the denoising loop.
        forecaster, order: the forecaster and its polynomial order.
        policy, granularity, runtime: the other choices, as text.
        hoist: whether latents-independent work was moved to the prologue.
    """

    model: str
    model_class: str
    config: Mapping[str, Any]
    num_steps: int
    forecaster: str
    order: int
    policy: str
    granularity: str
    runtime: str
    hoist: bool


@dataclass(frozen=True, slots=True, eq=False)
class Compiled:
    """Engines, plans and weights: everything that running takes.

    Args:
        description: what was compiled.
        signature: how the model is called.
        plans: what each step runs, by budget.
        variants: programs and engines, one for each set of input shapes.
        capture_macs: multiply-accumulates of one call of the original, per variant.
        weights: every weight, once.
        folder: holds the engine files, one folder for each variant.
        keep: kept alive with this object.
    """

    description: Description
    signature: Signature
    plans: Mapping[int, Plan]
    variants: tuple[Variant, ...]
    capture_macs: tuple[int, ...]
    weights: Mapping[str, Tensor]
    folder: Path
    keep: Any = None

    @property
    def schedules(self) -> dict[int, Schedule]:
        """The schedule of every budget."""
        return {budget: plan.schedule for budget, plan in self.plans.items()}

    def dispatcher(self, budget: int) -> Dispatcher:
        """The model call under one budget, with a state of its own.

        Raises:
            DispatchError: the budget was not compiled.
        """
        return Dispatcher(self._plan(budget), self.variants, self.signature)

    def cost(self, budget: int, variant: int = 0) -> Cost:
        """What one generation costs, for one guidance branch."""
        this = self.variants[variant]
        return cost_of(self._plan(budget), this.programs, this.device, self.capture_macs[variant])

    def save(self, folder: str | Path) -> None:
        """Write an artifact folder; an artifact that is there already is replaced at once or not at all.

        Raises:
            ArtifactError: the folder cannot be written, or holds something else.
        """
        from recache_compile.artifact import save

        save(self, Path(folder))

    def _plan(self, budget: int) -> Plan:
        if budget not in self.plans:
            raise DispatchError(f"budget {budget} was not compiled; there are {', '.join(map(str, self.plans))}")
        return self.plans[budget]
