"""What takes a transformer's place in a `diffusers` pipeline: the same call on compiled engines."""

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from recache_compile.compiler.compiled import Compiled
from recache_compile.errors import DispatchError, MismatchError
from recache_compile.ir.signature import named_leaves
from recache_compile.ir.value import Kind
from recache_compile.pipelines.branches import Branches
from recache_compile.runtimes.dispatcher import Dispatcher


class CompiledTransformer(nn.Module):
    """Takes a transformer's place in a pipeline: same call, same configuration, compiled engines.

    The step is what the pipeline tells through `cache_context`, else what its scheduler
    says, else the place of the timestep in the scheduler's table; calls are never counted.
    The guidance branch is what the pipeline tells, else it is known by its conditioning.
    The first step of a generation is recomputed, wherever in the schedule it is.

    Args:
        compiled: the engines.
        pipeline: the pipeline, for its scheduler.
        budget: number of recompute steps; may be set later.
        original: runs what was not compiled; None: that is an error.
        dispatcher: runs this budget, instead of a new one.
    """

    def __init__(
        self,
        compiled: Compiled,
        pipeline: Any,
        budget: int,
        original: nn.Module | None = None,
        dispatcher: Dispatcher | None = None,
    ) -> None:
        super().__init__()
        self._compiled = compiled
        self._pipeline = pipeline
        self._dispatchers: dict[int, Dispatcher] = {} if dispatcher is None else {budget: dispatcher}
        self._branch: str | None = None
        self._branches = Branches()
        self._told: int | None = None
        self._last: int | None = None
        self._warned = False  # in this generation
        self.placeholder = nn.Parameter(torch.empty(0, device=self.device), False)  # offloading asks where weights are
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
        return next(value.dtype for value in this.inputs if value.name == this.names(Kind.LATENTS)[0])

    @property
    def device(self) -> torch.device:
        """Where the engines run."""
        return self._compiled.variants[0].device

    def __getattr__(self, name: str) -> Any:
        """Entries of the configuration, as the models of `diffusers` give them out."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name != "_compiled" and name in self._compiled.description.config:
                return self._compiled.description.config[name]
            raise AttributeError(
                f"the compiled transformer has no {name!r}: it has its engines and its configuration; ask the original"
            ) from None

    def _apply(self, fn: Any, recurse: bool = True) -> "CompiledTransformer":
        """Move and cast what calls fall back to; engines stay where and what they are."""
        if self.original is not None:
            self.original._apply(fn, recurse)
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> "CompiledTransformer":
        """One with a state of its own, on the same engines and weights."""
        pipeline = memo.get(id(self._pipeline), self._pipeline)
        return CompiledTransformer(self._compiled, pipeline, self._budget, self.original)

    @contextlib.contextmanager
    def generation(self, pipeline: Any, budget: int | None = None) -> Iterator[None]:
        """One call of a pipeline, under a budget of its own if it is given one.

        Its first step is whatever comes first.
        """
        before = self._pipeline, self._budget
        self.budget = before[1] if budget is None else budget
        self._pipeline, self._last, self._warned = pipeline, None, False
        try:
            yield
        finally:
            self._dispatchers[self._budget].reset(start=None)  # history is not kept for a generation that is over
            self._pipeline, self._budget = before

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
            if not self._warned:
                warnings.warn(f"running the original transformer: {error}", stacklevel=2)
            self._warned = True
            return self.original(*args, return_dict=return_dict, **kwargs)
        if not return_dict:
            return result
        from diffusers.models.modeling_outputs import Transformer2DModelOutput

        return Transformer2DModelOutput(sample=result[0] if isinstance(result, tuple) else result)

    def _run(self, inputs: Mapping[str, Any]) -> Any:
        dispatcher, leaves = self._dispatchers[self._budget], named_leaves(inputs)
        step = self._step(leaves)
        if self._last is None or step < self._last:
            dispatcher.reset(start=None)
            self._branches = Branches()
        self._last = step
        branch = self._branch
        if branch is None:
            this = self._compiled.variants[0]
            branch = self._branches.find(step, leaves, {*this.names(Kind.LATENTS), *this.names(Kind.TIMESTEP)})
        return dispatcher(step=step, branch=branch, **inputs)

    def _step(self, leaves: Mapping[str, Any]) -> int:
        scheduler = self._pipeline.scheduler
        steps, compiled = len(scheduler.timesteps), self._compiled.description.num_steps
        if steps != compiled:
            raise MismatchError(
                f"the pipeline runs {steps} steps, but {compiled} were compiled: {_remedy(scheduler, compiled)}"
            )
        if self._told is not None:
            return self._told
        if not hasattr(scheduler, "step_index"):
            return self._step_of_timestep(leaves)
        if scheduler.step_index is not None:
            return int(scheduler.step_index)
        begin = getattr(scheduler, "begin_index", None)
        return min(self._places(leaves), default=0) if begin is None else int(begin)

    def _step_of_timestep(self, leaves: Mapping[str, Any]) -> int:
        """Look the timestep up, for schedulers that do not tell their step."""
        found = self._places(leaves)
        if len(found) != 1:
            raise DispatchError(
                f"{type(self._pipeline.scheduler).__name__} does not tell its step, and the timestep is"
                f" {'at several places' if found else 'not'} in its table; use another scheduler"
            )
        return found.pop()

    def _places(self, leaves: Mapping[str, Any]) -> set[int]:
        """Where in the scheduler's table the timestep is."""
        table = self._pipeline.scheduler.timesteps
        given = [leaves.get(name) for name in self._compiled.variants[0].names(Kind.TIMESTEP)]
        return {
            int(at)
            for tensor in given
            if isinstance(tensor, Tensor)
            for at in (table == tensor.flatten()[0].to(table.device)).nonzero()
        }


def _remedy(scheduler: Any, compiled: int) -> str:
    """What to do where the number of steps is not the compiled one."""
    steps, asked = len(scheduler.timesteps), getattr(scheduler, "num_inference_steps", None)
    if asked in (None, steps):
        return f"pass num_inference_steps={compiled}, or compile with num_steps={steps}"
    return (
        f"{type(scheduler).__name__} makes {steps} of num_inference_steps={asked}; compile with num_steps={steps} and"
        f" call={{'num_inference_steps': {asked}}}, or use another scheduler"
    )
