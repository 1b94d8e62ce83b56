"""The two types: engines, which know no budget, and engines with plans, which run one."""

import contextlib
import html
import threading
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recache_compile.compiler.overlay import Overlay, Patch
from recache_compile.compiler.refit import replace_weights
from recache_compile.config import CompileConfig
from recache_compile.errors import DispatchError
from recache_compile.ir.cost import Cost, cost_of
from recache_compile.ir.forecasters import Forecaster, Reuse
from recache_compile.ir.plan import Plan, make_plan
from recache_compile.ir.schedule import Schedule
from recache_compile.ir.signature import Signature
from recache_compile.ir.value import Kind
from recache_compile.runtimes._cuda_graphs import with_graphs
from recache_compile.runtimes.base import Engine, Revision, Variant
from recache_compile.runtimes.dispatcher import Dispatcher
from recache_compile.runtimes.dispatcher_observer import Observer
from recache_compile.runtimes.dispatcher_replay import ReplayDispatcher
from recache_compile.runtimes.registry import known_runtime


@dataclass(frozen=True, slots=True)
class Description:
    """What was compiled, for people and for the manifest.

    Args:
        model: name, folder or Hub id of the model; its class name when a module was given.
        model_class: qualified name of the module's class.
        model_config: the module's configuration, where it has one.
        config: the choices of the compilation; runtime, dtype and device are those that it found.
        weights: names of the module's parameters and stored buffers, read by a program or not.
        unread: hash of those that no program reads, by name: new values of them would have no effect.
        tied: second names of weights, and the names by which programs read them.
        fused: names of the weights that adapters had changed when the module was compiled.
    """

    model: str
    model_class: str
    model_config: Mapping[str, Any]
    config: CompileConfig
    weights: tuple[str, ...] = ()
    unread: Mapping[str, str] = field(default_factory=dict)
    tied: Mapping[str, str] = field(default_factory=dict)
    fused: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Engines:
    """Programs, lowered programs and weights.

    Args:
        description: what was compiled.
        signature: how the model is called.
        variants: programs and engines, one for each set of input shapes.
        weights: every weight, once.
        folder: holds the engine files, where an artifact has them.
        requirements: library versions and hardware that the engines fit; empty: any.
        keep: kept alive with this object.
        revision: counts how often the weights were replaced.
        overlay: what they read in the place of their own weights.
    """

    description: Description
    signature: Signature
    variants: tuple[Variant, ...]
    weights: Mapping[str, Tensor]
    folder: Path
    requirements: Mapping[str, str]
    keep: Any = None
    revision: Revision = field(default_factory=Revision)
    overlay: Overlay = field(default_factory=Overlay)
    _graphed: list[tuple[Variant, ...]] = field(default_factory=list, init=False)
    _graphing: threading.Lock = field(default_factory=threading.Lock, init=False)

    @property
    def config(self) -> CompileConfig:
        """The choices that they were built with."""
        return self.description.config

    @property
    def device(self) -> torch.device:
        """Where inputs and weights are."""
        return self.variants[0].device

    @property
    def num_sites(self) -> int:
        """How many values are cached."""
        outputs = self.variants[0].programs["recompute"].outputs
        return sum(value.kind is Kind.FEATURE for value in outputs)

    def with_plans(
        self, schedules: Mapping[int, Schedule], forecaster: Forecaster, policy: str = "given"
    ) -> "Compiled":
        """What runs these schedules on the engines that are here: tables only, made in microseconds.

        Args:
            schedules: by budget.
            forecaster: fills the cached steps.
            policy: where the schedules come from, for people.

        Raises:
            DispatchError: a schedule is for another number of steps, or a forecast reads more
                anchors than the engines were built for.
        """
        if wrong := [each for each in schedules.values() if not isinstance(each, Schedule)]:
            raise DispatchError(
                f"with_plans: expected schedules, got {wrong[0]!r:.60}; Schedule(steps, num_steps) is one"
            )
        plans = {budget: make_plan(each, forecaster, self.num_sites) for budget, each in schedules.items()}
        for plan in plans.values():
            self._check(plan)
        return Compiled(self, plans, forecaster, policy)

    def uncached(self) -> "Compiled":
        """What recomputes every step."""
        steps = self.config.num_steps
        return self.with_plans({steps: Schedule.every(steps)}, Reuse(), "uncached")

    def replay(self, forecaster: Forecaster) -> ReplayDispatcher:
        """The model call under changing schedules, for those who compare them.

        Args:
            forecaster: fills the cached steps.
        """
        return ReplayDispatcher(
            forecaster, self.num_sites, self.config.num_steps, self.variants, self.signature, self.revision
        )

    def called_variants(self) -> tuple[Variant, ...]:
        """What dispatchers call: the variants, with CUDA graphs that all dispatchers share where they are wanted."""
        if not self.config.cuda_graphs or self.device.type != "cuda":
            return self.variants
        with self._graphing:
            if not self._graphed:
                self._graphed.append(tuple(map(with_graphs, self.variants)))
        return self._graphed[0]

    def on_this_device(self) -> "Engines":
        """The same, or with the programs themselves as engines where those that were built run elsewhere."""
        device, eager = self.device, known_runtime("eager")
        if known_runtime(self.config.runtime).engine_device(device).type == device.type:
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
        return replace(self, variants=tuple(variants), overlay=Overlay())

    def refit(self, state_dict: Mapping[str, Tensor], strict: bool = True) -> None:
        """Replace the weights in place, without compiling again: a fine-tune, or an adapter that was fused.

        Dispatchers that exist see the new weights in their next step, prologue included.
        The weights are shared with the module that was compiled, and with whatever else was
        compiled from it: they change too, but for weights that were not dense in memory.
        Tensors that the module's code has computed from weights once and kept are constants,
        and do not follow.

        Args:
            state_dict: tensors by their name in the original module; cast to the compiled dtype.
            strict: expect every weight of the module.  False: the others stay as they are.

        Raises:
            ModelError: a weight is missing, unknown, of another shape, or one that no engine reads;
                nothing has changed then.
        """
        facts = self.description
        with self.alone():
            replace_weights(self.weights, facts.weights, facts.unread, facts.tied, state_dict, strict)
            self.overlay.forget()
            self.revision.number += 1

    def alone(self) -> contextlib.AbstractContextManager[None]:
        """Between steps: no engine reads weights meanwhile, as far as calls are made inside of `reading`."""
        return self.overlay.alone()

    def reading(
        self, key: Hashable = None, patch: Callable[[], Patch] = Patch
    ) -> contextlib.AbstractContextManager[None]:
        """While engines run: they read these weights in the place of their own, which stay as they are.

        Calls that ask for the same weights may run at the same time, others wait for each
        other.  Memory that one patch has taken serves the next one.  Dispatchers that exist
        see the change in their next step, prologue included.

        Args:
            key: tells one patch from another; None: their own weights.
            patch: makes it, where engines read something else at the moment.

        Raises:
            ModelError: the patch does not fit the weights; nothing has changed then.
        """

        def lay() -> None:
            self.overlay.lay(patch(), self.weights, self._engines(), self.device)
            self.revision.number += 1

        return self.overlay.reading(key, lay)

    def _engines(self) -> list[Engine]:
        """All that read weights."""
        with self._graphing:
            variants = (*self.variants, *(each for graphed in self._graphed for each in graphed))
        return [engine for variant in variants for engine in variant.engines.values()]

    def __repr__(self) -> str:
        """One line: what they are and what they were built for."""
        programs = ", ".join(self.variants[0].programs)
        return f"Engines of {self.description.model} ({programs}; {len(self.variants)} kinds of calls)"

    def _check(self, plan: Plan) -> None:
        """Raise unless a plan can be run here."""
        steps, where = plan.schedule.num_steps, f"schedule {list(plan.schedule.recompute_steps)}"
        if steps != self.config.num_steps:
            raise DispatchError(f"{where}: is for {steps} steps, compiled were {self.config.num_steps}")
        reads = max(len(step.coefficients) for step in plan.steps)
        if reads > self.config.anchors:
            raise DispatchError(
                f"{where}: a forecast reads {reads} anchors, compiled for {self.config.anchors}; compile with its order"
            )


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Compiled:
    """Engines and plans: everything that running takes.

    Args:
        engines: programs, lowered programs and weights.
        plans: what each step runs, by budget.
        forecaster: fills the cached steps.
        policy: where the schedules came from, for people.
    """

    engines: Engines
    plans: Mapping[int, Plan]
    forecaster: Forecaster
    policy: str

    @property
    def description(self) -> Description:
        """What was compiled."""
        return self.engines.description

    @property
    def num_steps(self) -> int:
        """Length T of the denoising loop."""
        return self.engines.config.num_steps

    @property
    def variants(self) -> tuple[Variant, ...]:
        """Programs and engines, one for each set of input shapes."""
        return self.engines.variants

    @property
    def weights(self) -> Mapping[str, Tensor]:
        """Every weight, once."""
        return self.engines.weights

    @property
    def schedules(self) -> dict[int, Schedule]:
        """The schedule of every budget."""
        return {budget: plan.schedule for budget, plan in self.plans.items()}

    def dispatcher(self, budget: int, observers: Sequence[Observer] = ()) -> Dispatcher:
        """The model call under one budget, with a state of its own.

        Args:
            budget: number of recompute steps.
            observers: told of every step.

        Raises:
            DispatchError: the budget was not compiled.
        """
        engines = self.engines
        return Dispatcher(
            self._plan(budget),
            self.forecaster,
            engines.called_variants(),
            engines.signature,
            engines.revision,
            observers=observers,
        )

    def cost(self, budget: int, variant: int = 0) -> Cost:
        """What one generation costs, for one guidance branch."""
        this = self.variants[variant]
        return cost_of(self._plan(budget), this.programs, this.device, this.macs)

    def refit(self, state_dict: Mapping[str, Tensor], strict: bool = True) -> None:
        """Replace the weights in place, without compiling again; see `Engines.refit`."""
        self.engines.refit(state_dict, strict)

    def save(self, folder: str | Path) -> None:
        """Write an artifact folder; an artifact that is there already is replaced at once or not at all.

        Raises:
            ArtifactError: the folder cannot be written, or holds something else.
        """
        from recache_compile.artifact.store import save

        save(self, Path(folder))

    def push_to_hub(self, repository: str, *, private: bool = False, revision: str | None = None) -> str:
        """Upload an artifact to the Hugging Face Hub; see `artifact.hub.push_to_hub`."""
        from recache_compile.artifact.hub import push_to_hub

        return push_to_hub(self, repository, private=private, revision=revision)

    def __reduce__(self) -> tuple[Any, ...]:
        """What `pickle` keeps; see `artifact.pickling`."""
        from recache_compile.artifact.pickling import reduce

        return reduce(self)

    def __copy__(self) -> "Compiled":
        """The same: engines and weights are shared, dispatchers have a state of their own."""
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> "Compiled":
        """The same: engines and weights are shared, dispatchers have a state of their own."""
        return self

    def __repr__(self) -> str:
        """A few lines: what was compiled, and the steps of every budget."""
        return "\n".join([self._title(), *(f"  k = {budget}: {each.mask}" for budget, each in self.schedules.items())])

    def _repr_html_(self) -> str:
        """The same for notebooks, the steps as a row of cells, recomputed ones dark."""
        rows = "".join(
            f"<tr><td>k = {budget}</td><td>{''.join(map(_cell, schedule.mask))}</td></tr>"
            for budget, schedule in self.schedules.items()
        )
        return f"<div>{html.escape(self._title())}</div><table>{rows}</table>"

    def _title(self) -> str:
        config, size = self.engines.config, sum(weight.nbytes for weight in self.weights.values())
        return (
            f"Compiled {self.description.model}: {config.num_steps} steps, {self.forecaster.name} order"
            f" {self.forecaster.order}, policy {self.policy}, {config.granularity} sites, {config.dtype},"
            f" {config.runtime} on {config.device}, {size / 1e6:.3g} MB of weights"
        )

    def _plan(self, budget: int) -> Plan:
        if budget not in self.plans:
            raise DispatchError(f"budget {budget!r} was not compiled; there are {', '.join(map(str, self.plans))}")
        return self.plans[budget]


def _cell(bit: str) -> str:
    color = "#1f4e79" if bit == "1" else "#dce6f0"
    return f'<span style="display:inline-block;width:8px;height:14px;margin-right:1px;background:{color}"></span>'
