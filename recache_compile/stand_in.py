"""Take a transformer's place in a `diffusers` pipeline."""

import contextlib
import functools
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from recache_compile.compiled import Compiled
from recache_compile.errors import DispatchError, MismatchError, ModelError
from recache_compile.program import Role
from recache_compile.recording import DENOISER
from recache_compile.runtimes.dispatcher import Dispatcher

Fallback = Literal["eager"]


def accelerate(
    pipeline: Any,
    compiled: Compiled | Mapping[str, Compiled],
    budget: int | None = None,
    fallback: Fallback | None = None,
) -> Any:
    """Let a pipeline run on compiled engines, in place.

    Afterwards `pipeline(...)` works as before; `pipeline(..., budget=10)` changes the budget
    for one call.  The pipeline's own transformer may be None: its weights are not needed.

    Args:
        pipeline: a `diffusers` pipeline.
        compiled: what `compile` or `load` returned for its transformer; a mapping from
            component to that where it has several ("transformer", "transformer_2").
        budget: number of recompute steps; by default the smallest compiled one.
        fallback: "eager" runs the original transformer, with a warning, where a call is not
            of a kind that was compiled; by default that is an error.

    Raises:
        DispatchError: the budget was not compiled.
        ModelError: there is nothing to fall back to.
    """
    parts = {DENOISER: compiled} if isinstance(compiled, Compiled) else dict(compiled)
    if fallback not in (None, "eager"):
        raise ModelError(f"fallback {fallback!r} is unknown; choose 'eager' or None")
    stand_ins = {}
    for name, each in parts.items():
        original = getattr(pipeline, name, None)
        if isinstance(original, CompiledTransformer):
            original = original.original
        if fallback and original is None:
            raise ModelError(f"fallback 'eager' needs the original weights, but the pipeline has no {name}")
        chosen = min(each.plans) if budget is None else budget
        stand_ins[name] = CompiledTransformer(each, pipeline, chosen, original if fallback else None)
    for name, stand_in in stand_ins.items():
        setattr(pipeline, name, stand_in)
    _accept_budget(pipeline, tuple(stand_ins))
    return pipeline


def _accept_budget(pipeline: Any, names: tuple[str, ...]) -> None:
    """Give the pipeline's call a `budget`, and let its transformers know where a generation begins."""
    base = getattr(type(pipeline), "_recache_base", type(pipeline))

    @functools.wraps(base.__call__)
    def call(self: Any, *args: Any, budget: int | None = None, **kwargs: Any) -> Any:
        stand_ins = [getattr(self, name) for name in names]
        before = [each.budget for each in stand_ins]
        for each in stand_ins:
            each.budget = each.budget if budget is None else budget
            each.begin()
        try:
            return base.__call__(self, *args, **kwargs)
        finally:
            for each, its_budget in zip(stand_ins, before, strict=True):
                each.budget = its_budget

    pipeline.__class__ = type(
        base.__name__, (base,), {"__call__": call, "_recache_base": base, "__module__": base.__module__}
    )


class CompiledTransformer(nn.Module):
    """Takes a transformer's place in a pipeline: same call, same configuration, compiled engines.

    The step is what the pipeline tells through `cache_context`, else what its scheduler
    says, else the place of the timestep in the scheduler's table; calls are never counted.
    The first step of a generation is recomputed, wherever in the schedule it is.

    Args:
        compiled: the engines.
        pipeline: the pipeline, for its scheduler.
        budget: number of recompute steps; may be set later.
        original: runs what was not compiled; None: that is an error.
    """

    def __init__(self, compiled: Compiled, pipeline: Any, budget: int, original: nn.Module | None = None) -> None:
        super().__init__()
        self._compiled = compiled
        self._pipeline = pipeline
        self._dispatchers: dict[int, Dispatcher] = {}
        self._branch = ""
        self._told: int | None = None
        self._last: int | None = None
        self._original = (original,)  # in a tuple: not a submodule, whose weights would be moved and listed
        self.budget = budget

    @property
    def original(self) -> nn.Module | None:
        """What calls fall back to."""
        return self._original[0]

    @property
    def budget(self) -> int:
        """Number of recompute steps per generation."""
        return self._budget

    @budget.setter
    def budget(self, budget: int) -> None:
        if budget not in self._dispatchers:
            self._dispatchers[budget] = self._compiled.dispatcher(budget)
        self._budget = budget

    @property
    def config(self) -> Any:
        """The configuration of the transformer that was compiled."""
        from diffusers.configuration_utils import FrozenDict

        return FrozenDict(self._compiled.description.config)

    @property
    def dtype(self) -> torch.dtype:
        """Element type of the latents."""
        this = self._compiled.variants[0]
        return next(value.dtype for value in this.inputs if value.name == this.names(Role.LATENTS)[0])

    @property
    def device(self) -> torch.device:
        """Where the engines run."""
        return self._compiled.variants[0].device

    def begin(self) -> None:
        """A generation begins: its first step is whatever comes next."""
        self._last = None

    @contextlib.contextmanager
    def cache_context(self, name: str, step_index: int | None = None, **facts: Any) -> Iterator[None]:
        """Name the guidance branch (and, in newer pipelines, the step) of the calls inside."""
        before = self._branch, self._told
        self._branch, self._told = name, step_index
        try:
            yield
        finally:
            self._branch, self._told = before

    def forward(self, *args: Any, return_dict: bool = True, **kwargs: Any) -> Any:
        """One model call; arguments as the original's.

        Raises:
            MismatchError: the call is of a kind that was not compiled, and there is no fallback.
        """
        inputs = dict(zip(self._compiled.signature.parameters, args, strict=False)) | kwargs
        try:
            result = self._run(inputs)
        except MismatchError as error:
            if self.original is None:
                raise
            warnings.warn(f"running the original transformer: {error}", stacklevel=2)
            return self.original(*args, return_dict=return_dict, **kwargs)
        if not return_dict:
            return result
        from diffusers.models.modeling_outputs import Transformer2DModelOutput

        return Transformer2DModelOutput(sample=result[0] if isinstance(result, tuple) else result)

    def _run(self, inputs: Mapping[str, Any]) -> Any:
        dispatcher, step = self._dispatchers[self._budget], self._step(inputs)
        if self._last is None or step < self._last:
            dispatcher.reset(start=step)
        self._last = step
        return dispatcher(step=step, branch=self._branch, **inputs)

    def _step(self, inputs: Mapping[str, Any]) -> int:
        scheduler = self._pipeline.scheduler
        steps, compiled = len(scheduler.timesteps), self._compiled.description.num_steps
        if steps != compiled:
            raise MismatchError(
                f"the pipeline runs {steps} steps, but {compiled} were compiled: pass num_inference_steps={compiled},"
                f" or compile with num_steps={steps}"
            )
        if self._told is not None:
            return self._told
        if hasattr(scheduler, "step_index"):
            return int(scheduler.begin_index or 0) if scheduler.step_index is None else int(scheduler.step_index)
        return self._step_of_timestep(inputs)

    def _step_of_timestep(self, inputs: Mapping[str, Any]) -> int:
        """Look the timestep up, for schedulers that do not tell their step."""
        table = self._pipeline.scheduler.timesteps
        given = [
            inputs[name]
            for name in self._compiled.variants[0].names(Role.TIMESTEP)
            if isinstance(inputs.get(name), Tensor)
        ]
        found = {int(at) for tensor in given for at in (table == tensor.flatten()[0].to(table.device)).nonzero()}
        if len(found) != 1:
            raise DispatchError(
                f"{type(self._pipeline.scheduler).__name__} does not tell its step, and the timestep is"
                f" {'at several places' if found else 'not'} in its table; use another scheduler"
            )
        return found.pop()
