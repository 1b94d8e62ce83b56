"""What compiling returns and loading restores."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recache_compile.errors import DispatchError, ModelError
from recache_compile.ir.cost import Cost, cost_of
from recache_compile.ir.forecasters import Forecaster, get_forecaster
from recache_compile.ir.plan import Plan, make_plan
from recache_compile.ir.schedule import Schedule
from recache_compile.ir.signature import Signature
from recache_compile.runtimes._cuda_graphs import CudaGraphs
from recache_compile.runtimes.base import Revision, Variant
from recache_compile.runtimes.dispatcher import Dispatcher
from recache_compile.runtimes.dispatcher_replay import ReplayDispatcher
from recache_compile.runtimes.registry import known_runtime


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
        residual: whether differences are cached; None: where the granularity does so by itself.
        hoist: whether latents-independent work was moved to the prologue.
        dtype: of the latents.
        component: the pipeline's component that was compiled.
        call: arguments of the pipeline, beside the prompt, that it was compiled for; the first
            where there are several.
        weights: names of the module's parameters and stored buffers, read by a program or not.
        cuda_graphs: whether dispatchers replay CUDA graphs instead of calling engines.
        gram: what the forecaster `fitted` was fitted to (T, T); empty for the others.
    """

    model: str
    model_class: str
    config: Mapping[str, Any]
    num_steps: int
    forecaster: str
    order: int
    policy: str
    granularity: str
    residual: bool | None
    runtime: str
    hoist: bool
    dtype: str = "float32"
    component: str = "transformer"
    call: Mapping[str, Any] = field(default_factory=dict)
    weights: tuple[str, ...] = ()
    cuda_graphs: bool = False
    gram: tuple[tuple[float, ...], ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Compiled:
    """Engines, plans and weights: everything that running takes.

    Args:
        description: what was compiled.
        signature: how the model is called.
        plans: what each step runs, by budget.
        variants: programs and engines, one for each set of input shapes.
        weights: every weight, once.
        folder: holds the engine files, where an artifact has them.
        engines_for: library versions and hardware that the engines fit; empty: any.
        keep: kept alive with this object.
        revision: counts how often the weights were replaced.
    """

    description: Description
    signature: Signature
    plans: Mapping[int, Plan]
    variants: tuple[Variant, ...]
    weights: Mapping[str, Tensor]
    folder: Path
    engines_for: Mapping[str, str]
    keep: Any = None
    revision: Revision = field(default_factory=Revision)

    @property
    def forecaster(self) -> Forecaster:
        """What fills the cached steps."""
        facts = self.description
        return get_forecaster(facts.forecaster, facts.order, facts.gram or None)

    @property
    def schedules(self) -> dict[int, Schedule]:
        """The schedule of every budget."""
        return {budget: plan.schedule for budget, plan in self.plans.items()}

    def dispatcher(self, budget: int) -> Dispatcher:
        """The model call under one budget, with a state of its own.

        Raises:
            DispatchError: the budget was not compiled.
        """
        on_gpu = self.variants[0].device.type == "cuda"
        graphs = CudaGraphs if self.description.cuda_graphs and on_gpu else None
        return Dispatcher(self._plan(budget), self.forecaster, self.variants, self.signature, self.revision, graphs)

    def replay(self, forecaster: Forecaster | None = None) -> ReplayDispatcher:
        """The model call under changing schedules, for those who compare them.

        Args:
            forecaster: instead of the compiled one; it may hold no more anchors.
        """
        num_steps = self.description.num_steps
        return ReplayDispatcher(
            forecaster or self.forecaster, self._sites, num_steps, self.variants, self.signature, self.revision
        )

    def on_this_device(self) -> "Compiled":
        """The same, or with the programs themselves as engines where those that were built run elsewhere."""
        device, eager = self.variants[0].device, known_runtime("eager")
        if known_runtime(self.description.runtime).engine_device(device).type == device.type:
            return self
        variants = [
            replace(
                each,
                engines={
                    name: eager.load(program, (), self.weights, device) for name, program in each.programs.items()
                },
            )
            for each in self.variants
        ]
        return replace(self, variants=tuple(variants))

    def reschedule(self, schedules: Mapping[int, Schedule], forecaster: Forecaster | None = None) -> "Compiled":
        """The same engines under other schedules, or with another forecaster of the same order: new tables only.

        Args:
            schedules: by budget.
            forecaster: instead of the compiled one.

        Raises:
            DispatchError: they are for another number of steps, or need engines that were not compiled.
        """
        chosen = forecaster or self.forecaster
        description = replace(
            self.description, forecaster=chosen.name, order=chosen.order, gram=getattr(chosen, "gram", ())
        )
        plans = {budget: make_plan(each, chosen, self._sites) for budget, each in schedules.items()}
        self._check(plans.values())
        return replace(self, description=description, plans=plans)

    def cost(self, budget: int, variant: int = 0) -> Cost:
        """What one generation costs, for one guidance branch."""
        this = self.variants[variant]
        return cost_of(self._plan(budget), this.programs, this.device, this.macs)

    def refit(self, state_dict: Mapping[str, Tensor], strict: bool = True) -> None:
        """Replace the weights in place, without compiling again: a fine-tune, or an adapter that was fused.

        Dispatchers that exist see the new weights in their next step, prologue included.
        The weights are shared with the module that was compiled, and with whatever else was
        compiled from it: they change too, but for weights that were not dense in memory.  Tensors that the module's code has computed from
        weights once and kept are constants, and do not follow.

        Args:
            state_dict: tensors by their name in the original module; cast to the compiled dtype.
            strict: expect every weight of the module.  False: the others stay as they are.

        Raises:
            ModelError: a weight is missing, unknown or of another shape; nothing has changed then.
        """
        if not isinstance(state_dict, Mapping):
            raise ModelError(f"refit: expected a state dict, got {type(state_dict).__name__}; nothing was changed")
        known = set(self.weights) & set(self.description.weights)
        unknown = sorted(set(state_dict) - set(self.description.weights))
        missing = sorted(known - set(state_dict)) if strict else []
        shapes = [
            f"{name} is {list(state_dict[name].shape)}, compiled {list(self.weights[name].shape)}"
            for name in sorted(known & set(state_dict))
            if isinstance(state_dict[name], Tensor) and state_dict[name].shape != self.weights[name].shape
        ]
        unusable = sorted(name for name in known & set(state_dict) if not _is_usable(state_dict[name]))
        wrong = {"unknown": unknown, "missing": missing, "of another shape": shapes, "no dense tensor": unusable}
        for what, names in wrong.items():
            if names:
                more = f" and {len(names) - 3} more" if len(names) > 3 else ""
                raise ModelError(f"refit: {what}: {', '.join(names[:3])}{more}; nothing was changed")
        for name in known & set(state_dict):
            self.weights[name].copy_(state_dict[name])
        self.revision.number += 1

    def save(self, folder: str | Path) -> None:
        """Write an artifact folder; an artifact that is there already is replaced at once or not at all.

        Raises:
            ArtifactError: the folder cannot be written, or holds something else.
        """
        from recache_compile.artifact.store import save

        save(self, Path(folder))

    @property
    def _sites(self) -> int:
        return len(next(iter(self.plans.values())).steps[0].pattern)

    def _check(self, plans: Iterable[Plan]) -> None:
        """Raise unless these plans can be run on the engines that are here."""
        for plan in plans:
            steps, where = plan.schedule.num_steps, f"schedule {list(plan.schedule.recompute_steps)}"
            if steps != self.description.num_steps:
                raise DispatchError(f"{where}: is for {steps} steps, compiled were {self.description.num_steps}")
            missing = {step.program for step in plan.steps} - set(self.variants[0].programs)
            if missing:
                raise DispatchError(
                    f"{where}: needs {', '.join(sorted(missing))}, not compiled; compile with its budget and order"
                )

    def _plan(self, budget: int) -> Plan:
        if budget not in self.plans:
            raise DispatchError(f"budget {budget!r} was not compiled; there are {', '.join(map(str, self.plans))}")
        return self.plans[budget]


def _is_usable(value: object) -> bool:
    """Whether a weight can be taken from here: a dense tensor of numbers that has values."""
    return isinstance(value, Tensor) and value.layout is torch.strided and not value.is_meta and not value.is_complex()
