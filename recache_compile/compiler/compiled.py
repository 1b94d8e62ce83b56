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
from recache_compile.compiler.planner import Planner
from recache_compile.compiler.refit import replace_weights
from recache_compile.config import CompileConfig
from recache_compile.errors import DispatchError
from recache_compile.ir.cost import Cost, cost_of
from recache_compile.ir.forecasters import Forecaster, Reuse
from recache_compile.ir.plan import Plan, make_plan
from recache_compile.ir.schedule import Schedule
from recache_compile.ir.signature import Signature
from recache_compile.ir.value import Kind
from recache_compile.policies.base import Calibration, Policy
from recache_compile.runtimes._cuda_graphs import with_graphs
from recache_compile.runtimes.base import Engine, Revision, Variant
from recache_compile.runtimes.batcher import Batcher
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
        levels: noise level of every step that the pipeline's scheduler made, where there was one.
        fused: names of the weights that adapters had changed when the module was compiled.
    """

    model: str
    model_class: str
    model_config: Mapping[str, Any]
    config: CompileConfig
    weights: tuple[str, ...] = ()
    unread: Mapping[str, str] = field(default_factory=dict)
    tied: Mapping[str, str] = field(default_factory=dict)
    levels: tuple[float, ...] = ()
    fused: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Engines:
    """Programs, lowered programs and weights.

    Args:
        description: what was compiled.
        signature: how the model is called.
        variants: programs and engines, one for each kind of calls.
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
        self,
        schedules: Mapping[int, Schedule],
        forecaster: Forecaster,
        policy: str = "given",
        asks: Policy | None = None,
        calibration: Calibration | None = None,
    ) -> "Compiled":
        """What runs these schedules on the engines that are here: tables only, made in microseconds.

        Args:
            schedules: by budget, all for loops of one length, which may be any.
            forecaster: fills the cached steps.
            policy: where the schedules come from, for people.
            asks: the policy that other budgets are asked of; None: there are none.
            calibration: of the model, for policies that look at one.

        Raises:
            DispatchError: the schedules are for loops of several lengths, or a forecast reads more
                anchors than the engines were built for.
        """
        if wrong := [each for each in schedules.values() if not isinstance(each, Schedule)]:
            raise DispatchError(
                f"with_plans: expected schedules, got {wrong[0]!r:.60}; Schedule(steps, num_steps) is one"
            )
        lengths = {each.num_steps for each in schedules.values()}
        if len(lengths) != 1:
            raise DispatchError(
                f"with_plans: expected schedules of one length, got lengths {sorted(lengths) or 'of none'}"
            )
        plans = {budget: make_plan(each, forecaster, self.num_sites) for budget, each in schedules.items()}
        for plan in plans.values():
            self._check(plan)
        config = replace(self.config, num_steps=lengths.pop())
        engines = self if config == self.config else replace(self, description=replace(self.description, config=config))
        planner = Planner(plans, forecaster, self.num_sites, self.description.levels, asks, calibration)
        return Compiled(engines, planner, policy)

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
        where = f"schedule {list(plan.schedule.recompute_steps)}"
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
        planner: knows what each step runs, for every budget and every number of steps.
        policy: where the schedules came from, for people.
        shared: makes the dispatchers where they share their recompute calls.
    """

    engines: Engines
    planner: Planner
    policy: str
    shared: Batcher | None = None

    @property
    def description(self) -> Description:
        """What was compiled."""
        return self.engines.description

    @property
    def plans(self) -> Mapping[int, Plan]:
        """What each step runs, by the budgets that plans were made for beforehand."""
        return self.planner.plans

    @property
    def forecaster(self) -> Forecaster:
        """Fills the cached steps."""
        return self.planner.forecaster

    @property
    def num_steps(self) -> int:
        """Length T of the denoising loop that plans were made for beforehand."""
        return self.planner.num_steps

    @property
    def variants(self) -> tuple[Variant, ...]:
        """Programs and engines, one for each kind of calls."""
        return self.engines.variants

    @property
    def weights(self) -> Mapping[str, Tensor]:
        """Every weight, once."""
        return self.engines.weights

    @property
    def schedules(self) -> dict[int, Schedule]:
        """The schedules that were made beforehand, by budget."""
        return {budget: plan.schedule for budget, plan in self.plans.items()}

    def dispatcher(
        self, budget: float, observers: Sequence[Observer] = (), *, num_steps: int | None = None
    ) -> Dispatcher:
        """The model call under one budget, with a state of its own.

        Args:
            budget: number of recompute steps, or a share of all steps.
            observers: told of every step.
            num_steps: length of the loop; by default the one that plans were made for beforehand.

        Raises:
            DispatchError: the policy has no schedule for it.
        """
        return self.dispatcher_of(self.planner.plan(budget, num_steps), observers)

    def dispatcher_of(self, plan: Plan, observers: Sequence[Observer] = ()) -> Dispatcher:
        """The same under one plan."""
        engines = self.engines
        if self.shared is not None:
            return self.shared.dispatcher(plan, engines.signature, engines.revision, observers)
        return Dispatcher(plan, engines.called_variants(), engines.signature, engines.revision, observers=observers)

    def batcher(self, max_batch: int = 8, max_wait_ms: float = 5.0) -> "Compiled":
        """The same, whose dispatchers share their recompute calls where they run at the same time.

        Each generation runs in a thread of its own; rows of one engine call are requests, which may
        be at different steps of different plans.  A lone one runs as without; results are equal but
        for the rounding of larger matrix products.  `rc.accelerate(pipe, compiled.batcher())` lets
        copies of a pipeline, in threads, be batched.

        Args:
            max_batch: most requests in a call.
            max_wait_ms: a call waits that long, at most, for those of other generations.

        Raises:
            DispatchError: it was not compiled with `batching`, or a bound makes no sense.
        """
        most = known_runtime(self.engines.config.runtime).max_requests
        if most is not None and max_batch > most:
            raise DispatchError(
                f"batcher: max_batch {max_batch}: engines of this runtime serve {most} requests at most"
            )
        return replace(self, shared=Batcher(self.engines.called_variants(), max_batch, max_wait_ms))

    def cost(self, budget: float, variant: int = 0, *, num_steps: int | None = None) -> Cost:
        """What one generation costs, for one guidance branch."""
        this = self.variants[variant]
        return cost_of(self.planner.plan(budget, num_steps), this.programs, this.device, this.macs)

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
            f"Compiled {self.description.model}: {self.num_steps} steps, {self.forecaster.name} order"
            f" {self.forecaster.order}, policy {self.policy}, {config.granularity} sites, {config.dtype},"
            f" {config.runtime} on {config.device}, {size / 1e6:.3g} MB of weights"
        )


def _cell(bit: str) -> str:
    color = "#1f4e79" if bit == "1" else "#dce6f0"
    return f'<span style="display:inline-block;width:8px;height:14px;margin-right:1px;background:{color}"></span>'
