"""What takes a transformer's place in a `diffusers` pipeline: the same call on compiled engines."""

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any, ClassVar

import torch
from torch import nn

from recache_compile.capture.adapters import ATTENTION_KWARGS, STRENGTH, strength_of
from recache_compile.capture.processors import PROCESSORS, processors_of, processors_text, under_processors
from recache_compile.compiler.compiled import Compiled
from recache_compile.compiler.planner import check_form
from recache_compile.errors import DispatchError, MismatchError, ModelError
from recache_compile.ir.plan import Plan
from recache_compile.ir.signature import named_leaves
from recache_compile.ir.value import Kind
from recache_compile.pipelines.adapters import FOLLOWED, adapters_of, changing, notice, patch_of
from recache_compile.pipelines.branches import Branches
from recache_compile.pipelines.callers import calling_pipeline
from recache_compile.pipelines.generation import Generation, Generations
from recache_compile.pipelines.skeleton import skeleton_of
from recache_compile.pipelines.step_tracker import StepTracker, loop_length, remedy_for_length
from recache_compile.runtimes.dispatcher import Dispatcher
from recache_compile.runtimes.dispatcher_tables import Timetable

_MISSING: Any = object()


class CompiledTransformer(nn.Module):
    """Takes a transformer's place in a pipeline: same call, same configuration, compiled engines.

    The step is what the pipeline tells through `cache_context`, else what its scheduler knows;
    see `StepTracker`.  The guidance branch is what the pipeline tells, else it is known by its
    conditioning.  The first step of a generation is recomputed, wherever in the schedule it
    is.  Generations may run at the same time, in threads or inside one another.

    Args:
        compiled: the engines and plans.
        pipeline: the pipeline, for its scheduler.
        budget: number of recompute steps, or a share of all steps; may be set later.
        original: the transformer that was here before, if any.
        falls_back: whether it runs calls of a kind that was not compiled; otherwise they are errors.
        dispatcher: runs all generations under its own plan, whatever the budget.
    """

    adopt: ClassVar[Callable[[Any], None]] = staticmethod(lambda pipeline: None)
    """Is given pipelines that were made of the components of an accelerated one."""

    _wanted: ContextVar[Mapping[int, int | float]] = ContextVar("wanted", default={})  # noqa: B039 - never changed

    def __init__(
        self,
        compiled: Compiled,
        pipeline: Any,
        budget: float,
        original: nn.Module | None = None,
        falls_back: bool = False,
        dispatcher: Dispatcher | None = None,
    ) -> None:
        super().__init__()
        self._compiled = compiled
        self._pipeline = pipeline
        self._generations = Generations(compiled.dispatcher_of)
        self._dispatcher = dispatcher
        self.placeholder = nn.Parameter(torch.empty(0, device=self.device), False)  # offloading asks where weights are
        self._original = (original,)  # in a tuple: not a submodule, whose weights would be moved and listed
        self.falls_back = falls_back
        self.budget = budget
        self._processors: dict[str, Any] = {}  # of the generations, where they are not those at rest
        notice(original)

    @property
    def compiled(self) -> Compiled:
        """The engines and plans."""
        return self._compiled

    @property
    def original(self) -> nn.Module | None:
        """The transformer that was here before."""
        return self._original[0]

    @property
    def budget(self) -> int | float:
        """Number of recompute steps per generation, or a share of all steps."""
        return self._budget

    @budget.setter
    def budget(self, budget: float) -> None:
        if self._dispatcher is None:
            self._compiled.planner.check(budget)
        self._budget = budget

    def plan_for(self, scheduler: Any) -> Plan:
        """The plan of the loop that a scheduler's timesteps are set for, under the usual budget."""
        return self._plan(Timetable.of(scheduler, loop_length(scheduler)), self._budget)

    def _plan(self, timetable: Timetable, budget: float) -> Plan:
        return self._compiled.planner.plan(budget, len(timetable.timesteps), timetable.levels)

    def knows(self, budget: float) -> bool:
        """Whether there is a plan for a budget in a loop of the usual length."""
        try:
            self._compiled.planner.check(budget)
        except DispatchError:
            return False
        return True

    @property
    def config(self) -> Any:
        """The configuration of the transformer that was compiled."""
        from diffusers.configuration_utils import FrozenDict

        return FrozenDict(self._compiled.description.model_config)

    @property
    def dtype(self) -> torch.dtype:
        """Element type of the latents."""
        this = self._compiled.variants[0]
        return next(value.dtype for value in this.inputs if value.name == this.names(Kind.LATENTS)[0])

    @property
    def device(self) -> torch.device:
        """Where the engines run."""
        return self._compiled.engines.device

    def __getattr__(self, name: str) -> Any:
        """What pipelines read: entries of the configuration, and values, buffers and parts of the original.

        Of its methods, those that change adapters are given out, and engines follow; what
        others would change, they do not.  Nor is what is private, such as the hooks that
        offloading has put there.
        """
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or "_original" not in self.__dict__:
                raise
        if name in FOLLOWED and hasattr(self.original, name):
            return functools.partial(self._change_adapters, name)
        if name in self._compiled.description.model_config:
            return self._compiled.description.model_config[name]
        found = getattr(self.architecture, name, _MISSING)
        if found is _MISSING or (callable(found) and not isinstance(found, nn.Module)):
            what = f"no {name!r}" if found is _MISSING else f"no method {name}(), which its engines would not follow"
            raise AttributeError(f"the compiled transformer has {what}; rc.restore(pipeline) gives the original back")
        return found

    def _change_adapters(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """Call a method of the original that changes its adapters."""
        assert self.original is not None
        self._caller()
        with self._compiled.engines.alone(), changing([self.original], [], name == "fuse_lora", self.follow_adapters):
            return getattr(self.original, name)(*args, **kwargs)

    def follow_adapters(self) -> None:
        """Let engines have now what the original's adapters make of the weights, which the next step would do.

        Raises:
            ModelError: they cannot compute that.
        """
        with self._reading(1.0):
            pass

    def _reading(self, strength: float) -> contextlib.AbstractContextManager[None]:
        """While engines run: their weights are those of the original with its adapters, where it ever had some."""
        engines, original = self._compiled.engines, self.original
        known = adapters_of(original)
        if original is None or known is None:
            return engines.reading()
        return engines.reading((known.version, strength), lambda: patch_of(original, strength, engines.description))

    def _without_strength(self, inputs: dict[str, Any]) -> tuple[dict[str, Any], float]:
        """Arguments of a call without the strength of adapters, where weights can tell it; and the strength.

        Raises:
            ModelError: it cannot be another one, as adapters are fused.
        """
        known, compiled = adapters_of(self.original), self._strengths
        asked = [name for name in ATTENTION_KWARGS if isinstance(at := inputs.get(name), Mapping) and STRENGTH in at]
        if not asked and (known is None or not compiled):
            return inputs, 1.0
        strength = strength_of(inputs)
        if known is None and (compiled or self.original is None or self._compiled.description.fused):
            return inputs, 1.0  # what was compiled has one strength, and such a call is of that kind or of none
        if known is not None and known.fused and strength != 1.0:
            raise ModelError(
                f"adapters: a call asks for the strength {strength:g}, but they are fused; call unfuse_lora() first, or"
                " fuse_lora(lora_scale=...)"
            )
        others = {
            name: {k: v for k, v in inputs[name].items() if k != STRENGTH} or self._nothing(name) for name in asked
        }
        changed = {**inputs, **others}
        for name, value in compiled.items():
            changed[name] = {**(changed.get(name) or {}), STRENGTH: value}
        return changed, strength if known is not None else 1.0

    @functools.cached_property
    def _strengths(self) -> dict[str, float]:
        """The strength of adapters that calls of the compiled kinds have, by the argument that names it."""
        found = dict(each for variant in self._compiled.variants for each in variant.constants)
        named = {name: found.get(f"{name}.{STRENGTH}") for name in ATTENTION_KWARGS}
        return {name: float(text) for name, text in named.items() if text is not None}

    def _nothing(self, name: str) -> dict[str, Any] | None:
        """An argument with nothing in it, as the compiled kinds of calls have it."""
        return {} if any((name, "{}") in variant.constants for variant in self._compiled.variants) else None

    @property
    def architecture(self) -> nn.Module | None:
        """What pipelines read of the transformer: the original, or a module without weights; None: there is neither.

        It is never changed.
        """
        return self._original[0] or self._skeleton

    @functools.cached_property
    def _at_rest(self) -> dict[str, Any]:
        """The attention processors that the model was compiled with."""
        return processors_of(self.architecture)

    @property
    def attn_processors(self) -> dict[str, Any]:
        """The attention processors of the next call, by name."""
        generation = self._generations.active()
        return dict((self._processors if generation is None else generation.processors) or self._at_rest)

    def set_attn_processor(self, processors: Any) -> None:
        """Let the next calls be those of a module with these attention processors; such calls must have been compiled.

        Args:
            processors: by name, or one for all.

        Raises:
            CaptureError: one of them holds what tells no kind of call.
        """
        given = dict(processors) if isinstance(processors, Mapping) else dict.fromkeys(self._at_rest, processors)
        changed = given if processors_text(given, self._at_rest) else {}
        if (generation := self._generations.active()) is None:
            self._processors = changed
        else:
            generation.processors = changed

    @functools.cached_property
    def _skeleton(self) -> nn.Module | None:
        """Stands for the original where the pipeline was loaded without it."""
        return skeleton_of(self._compiled.description, self._compiled.weights)

    def _apply(self, fn: Any, recurse: bool = True) -> "CompiledTransformer":
        """Move and cast what calls fall back to; engines stay where and what they are."""
        self._caller()
        if self.falls_back and self.original is not None:
            self.original._apply(fn, recurse)
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> "CompiledTransformer":
        """Another one on the same engines and weights."""
        pipeline = memo.get(id(self._pipeline), self._pipeline)
        copied = CompiledTransformer(self._compiled, pipeline, self._budget, self.original, self.falls_back)
        copied._processors = self._processors
        return copied

    def __getstate__(self) -> tuple[Any, ...]:
        """What is pickled: no generation that is under way."""
        return (self._compiled, self._pipeline, self._budget, self.original, self.falls_back), self._processors

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        """Begin anew with the same engines."""
        arguments, processors = state
        self.__init__(*arguments)  # type: ignore[misc]
        self._processors = processors

    @contextlib.contextmanager
    def generation(self, pipeline: Any, budget: float | None = None) -> Iterator[None]:
        """One call of a pipeline, under a budget of its own if it is given one; its first step is whatever comes first.

        Raises:
            DispatchError: there is no plan for the budget.
        """
        if budget is None:
            budget = self._wanted.get().get(id(self), self._budget)
        check_form(budget)  # whether there is a plan for it depends on the loop
        with self._generations.begin(pipeline, budget, self._new_steps(), self._processors):
            yield

    @contextlib.contextmanager
    def under(self, budget: float | None) -> Iterator[None]:
        """Pipeline calls inside, which another pipeline makes, have this budget unless they are given one.

        Raises:
            DispatchError: there is no plan for the budget.
        """
        if budget is not None:
            check_form(budget)
        wanted = {} if budget is None else {id(self): budget}
        token = self._wanted.set({**self._wanted.get(), **wanted})
        try:
            yield
        finally:
            self._wanted.reset(token)

    @contextlib.contextmanager
    def cache_context(self, name: str, step_index: int | None = None, **facts: Any) -> Iterator[None]:
        """Name the guidance branch (and, in newer pipelines, the step) of the calls inside."""
        generation = self._generation()
        before, generation.branch = generation.branch, name
        try:
            with generation.steps.telling(step_index):
                yield
        finally:
            generation.branch = before

    def forward(self, *args: Any, return_dict: bool = True, **kwargs: Any) -> Any:
        """One model call; arguments as the original's.

        Raises:
            MismatchError: the call is of a kind that was not compiled, and there is no fallback.
            ModelError: it asks for a strength that adapters cannot have.
        """
        inputs = dict(zip(self._compiled.engines.signature.parameters, args, strict=False)) | kwargs
        generation = self._generation()
        inputs, strength = self._without_strength(inputs)
        if generation.processors:
            inputs[PROCESSORS] = processors_text(generation.processors, self._at_rest)
        try:
            result = self._run(generation, inputs, strength)
        except MismatchError as error:
            if not self.falls_back or self.original is None:
                raise
            if not generation.warned:
                warnings.warn(f"running the original transformer: {error}", stacklevel=2)
            generation.warned = True
            with under_processors(self.original, generation.processors):
                return self.original(*args, return_dict=return_dict, **kwargs)
        if not return_dict:
            return result
        from diffusers.models.modeling_outputs import Transformer2DModelOutput

        return Transformer2DModelOutput(sample=result[0] if isinstance(result, tuple) else result)

    def _generation(self) -> Generation:
        pipeline = self._pipeline if self._generations.active() else self._caller()
        return self._generations.current(pipeline, self._budget, self._new_steps, self._processors)

    def _caller(self) -> Any:
        """The pipeline that calls, accelerated if it was not; the one that this was made for, where none is known."""
        if (found := calling_pipeline(self)) is None:
            return self._pipeline
        CompiledTransformer.adopt(found)
        return found

    def _new_steps(self) -> StepTracker:
        return StepTracker(self._compiled.variants[0].names(Kind.TIMESTEP))

    def _begin(self, generation: Generation) -> Dispatcher:
        """What runs a generation whose first call has come: its loop has as many steps as its scheduler says."""
        scheduler, steps = generation.pipeline.scheduler, generation.steps.num_steps
        timetable = Timetable.of(scheduler, steps)
        if (fixed := self._dispatcher) is None:
            dispatcher = self._generations.follow(generation, self._plan(timetable, generation.budget))
        elif len(fixed.plan.steps) != steps:
            raise MismatchError(remedy_for_length(scheduler, len(fixed.plan.steps)))
        else:
            dispatcher = generation.dispatcher = fixed
        dispatcher.reset(start=None, timetable=timetable)
        generation.branches = Branches()
        return dispatcher

    def _run(self, generation: Generation, inputs: Mapping[str, Any], strength: float) -> Any:
        leaves = named_leaves(inputs)
        step, begins = generation.steps.advance(generation.pipeline.scheduler, leaves, generation.in_call)
        dispatcher = generation.dispatcher
        if begins or dispatcher is None:
            dispatcher = self._begin(generation)
        branch = generation.branch
        if branch is None:
            this = self._compiled.variants[0]
            changing = {*this.names(Kind.LATENTS), *this.names(Kind.TIMESTEP)}
            branch = generation.branches.find(step, leaves, changing)
        with self._reading(strength):
            return dispatcher(step=step, branch=branch, **inputs)
