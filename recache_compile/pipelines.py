"""`diffusers` pipelines: load them, watch how they call their transformer, stand in for it."""

import contextlib
import functools
import inspect
import logging
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from recache_compile.capture import ROLE_NAMES
from recache_compile.compiled import Compiled
from recache_compile.compiler import Example
from recache_compile.errors import DispatchError, ModelError, RecacheError, RuntimeUnavailableError
from recache_compile.export import named_leaves
from recache_compile.program import Role
from recache_compile.runtimes.dispatcher import Dispatcher

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

_UNKNOWN = "not an embedded model (shapes), a pipeline folder, or a Hub id that can be loaded here"
EMBEDDED = {"shapes": Path(__file__).parent / "models" / "shapes" / "weights"}


def load_pipeline(model: str, **components: Any) -> "DiffusionPipeline":
    """A pipeline from the name of an embedded model, a local folder or a Hub id.

    Args:
        model: what the user wrote.
        components: replace components, as `transformer=None`.

    Raises:
        ModelError: there is no such model, or it is no pipeline.
    """
    from diffusers import DiffusionPipeline
    from diffusers.utils.logging import disable_progress_bar

    disable_progress_bar()
    try:
        folder = EMBEDDED.get(model, Path(model))
        if folder.is_dir() and not (folder / "model_index.json").is_file():
            raise ModelError(f"model {model}: the folder holds no pipeline (no model_index.json)")
        if not folder.is_dir() and model.count("/") != 1:
            raise ModelError(f"model {model}: {_UNKNOWN}")
        source = str(folder) if folder.is_dir() else model
        config = DiffusionPipeline.load_config(source)
        _require_libraries(model, config)
        cls = _embedded_class(config["_class_name"]) or DiffusionPipeline
        with _no_random_weights(model):
            return cls.from_pretrained(
                source,
                dtype=torch.float32,
                use_safetensors=True,
                low_cpu_mem_usage=find_spec("accelerate") is not None,
                **components,
            )
    except RecacheError:
        raise
    except Exception as error:  # diffusers and the Hub raise many kinds, none of them ours
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ModelError(f"model {model}: {_UNKNOWN}: {reason[:300]}") from error


@contextlib.contextmanager
def _no_random_weights(model: str) -> Iterator[None]:
    """Refuse a checkpoint that lacks weights: `diffusers` would make them up and only log it."""
    told: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            told.append(record.getMessage())

    listener, logger = Listener(), logging.getLogger("diffusers")
    logger.addHandler(listener)
    try:
        yield
    finally:
        logger.removeHandler(listener)
    if missing := [message for message in told if "newly initialized" in message]:
        raise ModelError(f"model {model}: weights are missing: {' '.join(missing[0].split())[:300]}")


def _require_libraries(model: str, config: Mapping[str, Any]) -> None:
    """Name the missing package before `diffusers` stumbles over it."""
    for component, entry in config.items():
        if not isinstance(entry, (list, tuple)) or len(entry) != 2 or not isinstance(entry[0], str):
            continue
        package = entry[0].partition(".")[0]
        if package in ("transformers", "sentencepiece") and find_spec(package) is None:
            raise RuntimeUnavailableError(
                f"model {model}: its {component} needs the package {package}; pip install 'recache-compile[hub]'"
            )


def transformer_of(pipeline: Any) -> nn.Module:
    """The pipeline's denoiser.

    Raises:
        ModelError: there is none under the name `transformer`.
    """
    module = getattr(pipeline, "transformer", None)
    if not isinstance(module, nn.Module):
        raise ModelError(f"{type(pipeline).__name__}: has no transformer to compile")
    return module


def record_examples(pipeline: Any, num_steps: int, call: Mapping[str, Any]) -> list[Example]:
    """Run a pipeline with a stand-in for its transformer and keep what it was called with.

    The transformer itself runs once, to learn the shape of its result; afterwards the
    stand-in answers with zeros.

    Returns:
        One example for each distinct set of input shapes, with the timesteps of all steps.

    Raises:
        ModelError: the pipeline cannot be called so, or never called its transformer.
    """
    module = transformer_of(pipeline)
    original, signature = module.forward, inspect.signature(module.forward)
    calls: list[dict[str, Any]] = []
    answer: list[Any] = []

    def stand_in(*args: Any, **kwargs: Any) -> Any:
        calls.append(_arguments(signature, args, kwargs))
        if not answer:
            answer.append(pytree.tree_map(torch.zeros_like, original(*args, **kwargs)))
        return answer[0]

    module.forward = stand_in  # type: ignore[method-assign]
    try:
        arguments = {"prompt": "", "num_inference_steps": num_steps, "output_type": "latent", **call}
        with _silent_progress(pipeline), torch.random.fork_rng():
            pipeline(**arguments)
    except Exception as error:  # whatever the pipeline's own checks raise
        raise ModelError(
            f"{type(pipeline).__name__}: recording a call with {sorted(arguments)} failed: {error}"
        ) from error
    finally:
        del module.forward
    if not calls:
        raise ModelError(f"{type(pipeline).__name__}: never called its transformer")
    groups: dict[Any, list[dict[str, Any]]] = {}
    for inputs in calls:
        leaves = {name: leaf for name, leaf in named_leaves(inputs).items() if isinstance(leaf, Tensor)}
        groups.setdefault(tuple((name, leaf.shape, leaf.dtype) for name, leaf in leaves.items()), []).append(inputs)
    return [Example(group[0], _timetable(group, num_steps)) for group in groups.values()]


def accelerate(pipeline: Any, compiled: Compiled, budget: int | None = None) -> Any:
    """Let a pipeline run on compiled engines, in place.

    Afterwards `pipeline(...)` works as before; `pipeline(..., budget=10)` changes the budget
    for one call.  The pipeline's own transformer may be None: its weights are not needed.

    Args:
        pipeline: a `diffusers` pipeline.
        compiled: what `compile` or `load` returned for its transformer.
        budget: number of recompute steps; by default the smallest compiled one.

    Raises:
        DispatchError: the budget was not compiled.
    """
    stand_in = CompiledTransformer(compiled, pipeline, min(compiled.plans) if budget is None else budget)
    pipeline.transformer = stand_in
    base = getattr(type(pipeline), "_recache_base", type(pipeline))

    @functools.wraps(base.__call__)
    def call(self: Any, *args: Any, budget: int | None = None, **kwargs: Any) -> Any:
        before = self.transformer.budget
        if budget is not None:
            self.transformer.budget = budget
        try:
            return base.__call__(self, *args, **kwargs)
        finally:
            self.transformer.budget = before

    pipeline.__class__ = type(
        base.__name__, (base,), {"__call__": call, "_recache_base": base, "__module__": base.__module__}
    )
    return pipeline


class CompiledTransformer(nn.Module):
    """Takes a transformer's place in a pipeline: same call, same configuration, compiled engines.

    The step is what the pipeline tells through `cache_context`, else what its scheduler
    says; model calls are never counted.

    Args:
        compiled: the engines.
        pipeline: the pipeline, for its scheduler.
        budget: number of recompute steps; may be set later.
    """

    def __init__(self, compiled: Compiled, pipeline: Any, budget: int) -> None:
        super().__init__()
        self._compiled = compiled
        self._pipeline = pipeline
        self._dispatchers: dict[int, Dispatcher] = {}
        self._branch = ""
        self._step: int | None = None
        self.budget = budget

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
        latents = self._compiled.variants[0].names(Role.LATENTS)[0]
        return next(value.dtype for value in self._compiled.variants[0].inputs if value.name == latents)

    @property
    def device(self) -> torch.device:
        """Where the engines run."""
        return self._compiled.variants[0].device

    @contextlib.contextmanager
    def cache_context(self, name: str, step_index: int | None = None, **facts: Any) -> Iterator[None]:
        """Name the guidance branch (and, in newer pipelines, the step) of the calls inside."""
        before = self._branch, self._step
        self._branch, self._step = name, step_index
        try:
            yield
        finally:
            self._branch, self._step = before

    def forward(self, *args: Any, return_dict: bool = True, **kwargs: Any) -> Any:
        """One model call; arguments as the original's.

        Raises:
            DispatchError: the pipeline runs another number of steps than was compiled.
        """
        inputs = dict(zip(self._compiled.signature.parameters, args, strict=False)) | kwargs
        result = self._dispatchers[self._budget](step=self._current_step(inputs), branch=self._branch, **inputs)
        if not return_dict:
            return result
        from diffusers.models.modeling_outputs import Transformer2DModelOutput

        return Transformer2DModelOutput(sample=result[0])

    def _current_step(self, inputs: Mapping[str, Any]) -> int:
        scheduler = self._pipeline.scheduler
        steps, compiled = len(scheduler.timesteps), self._compiled.description.num_steps
        if steps != compiled:
            raise DispatchError(
                f"the pipeline runs {steps} steps, but {compiled} were compiled: pass num_inference_steps={compiled},"
                f" or compile with num_steps={steps}"
            )
        if self._step is not None:
            return self._step
        if hasattr(scheduler, "step_index"):
            return int(scheduler.begin_index or 0) if scheduler.step_index is None else int(scheduler.step_index)
        return self._step_of_timestep(inputs)

    def _step_of_timestep(self, inputs: Mapping[str, Any]) -> int:
        """Look the timestep up, for schedulers that do not tell their step."""
        found: set[int] = set()
        for variant in self._compiled.variants:
            for name, column in variant.timesteps.items():
                if inputs[name].shape == column.shape[1:]:
                    found |= {step for step, row in enumerate(column) if torch.equal(row, inputs[name])}
        if len(found) != 1:
            raise DispatchError(
                f"{type(self._pipeline.scheduler).__name__} does not tell its step, and the timestep is"
                f" {'at several' if found else 'not among the'} compiled steps; compile with this scheduler's timesteps"
            )
        return found.pop()


def _arguments(signature: inspect.Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name, those for `**kwargs` beside the others."""
    bound = dict(signature.bind(*args, **kwargs).arguments)
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            bound |= bound.pop(name, {})
    return bound


def _timetable(calls: list[dict[str, Any]], num_steps: int) -> dict[str, Tensor]:
    """Timestep inputs of all steps, from calls that were made equally often in every step."""
    per_step, rest = divmod(len(calls), num_steps)
    if rest:
        return {}
    names = [name for name in ROLE_NAMES[Role.TIMESTEP] if isinstance(calls[0].get(name), Tensor)]
    return {name: torch.stack([inputs[name] for inputs in calls[::per_step]]) for name in names}


def _embedded_class(name: str) -> Any:
    if name != "ShapesPipeline":
        return None
    from recache_compile.models.shapes.pipeline import ShapesPipeline

    return ShapesPipeline


@contextlib.contextmanager
def _silent_progress(pipeline: Any) -> Iterator[None]:
    before = dict(getattr(pipeline, "_progress_bar_config", {}))
    pipeline.set_progress_bar_config(disable=True)
    try:
        yield
    finally:
        pipeline.set_progress_bar_config(**{**before, "disable": before.get("disable", False)})
