"""What takes a transformer's place in a `diffusers` pipeline: the same call on compiled engines."""

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from recache_compile.compiler.compiled import Compiled
from recache_compile.errors import MismatchError
from recache_compile.ir.program import Role
from recache_compile.ir.signature import named_leaves
from recache_compile.pipelines.branches import Branches
from recache_compile.pipelines.step_tracker import StepTracker
from recache_compile.runtimes.dispatcher import Dispatcher


class CompiledTransformer(nn.Module):
    """Takes a transformer's place in a pipeline: same call, same configuration, compiled engines.

    The step is what the pipeline tells through `cache_context`, else what its scheduler knows;
    see `StepTracker`.
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
        self._steps = StepTracker(compiled.num_steps, compiled.variants[0].names(Role.TIMESTEP))
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

        return FrozenDict(self._compiled.description.model_config)

    @property
    def dtype(self) -> torch.dtype:
        """Element type of the latents."""
        this = self._compiled.variants[0]
        return next(value.dtype for value in this.inputs if value.name == this.names(Role.LATENTS)[0])

    @property
    def device(self) -> torch.device:
        """Where the engines run."""
        return self._compiled.variants[0].device

    def __getattr__(self, name: str) -> Any:
        """Entries of the configuration, as the models of `diffusers` give them out."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name != "_compiled" and name in self._compiled.description.model_config:
                return self._compiled.description.model_config[name]
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
        self._pipeline, self._warned = pipeline, False
        self._steps.restart()
        try:
            yield
        finally:
            self._dispatchers[self._budget].reset(start=None)  # history is not kept for a generation that is over
            self._pipeline, self._budget = before

    @contextlib.contextmanager
    def cache_context(self, name: str, step_index: int | None = None, **facts: Any) -> Iterator[None]:
        """Name the guidance branch (and, in newer pipelines, the step) of the calls inside."""
        before, self._branch = self._branch, name
        try:
            with self._steps.telling(step_index):
                yield
        finally:
            self._branch = before

    def forward(self, *args: Any, return_dict: bool = True, **kwargs: Any) -> Any:
        """One model call; arguments as the original's.

        Raises:
            MismatchError: the call is of a kind that was not compiled, and there is no fallback.
        """
        inputs = dict(zip(self._compiled.engines.signature.parameters, args, strict=False)) | kwargs
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
        step, begins = self._steps.advance(self._pipeline.scheduler, leaves)
        if begins:
            dispatcher.reset(start=None)
            self._branches = Branches()
        branch = self._branch
        if branch is None:
            this = self._compiled.variants[0]
            branch = self._branches.find(step, leaves, {*this.names(Role.LATENTS), *this.names(Role.TIMESTEP)})
        return dispatcher(step=step, branch=branch, **inputs)
