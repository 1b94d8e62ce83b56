"""Take a transformer's place in a `diffusers` pipeline."""

import contextlib
import functools
from collections.abc import Mapping
from typing import Any, Literal

from recache_compile.compiler.compiled import Compiled
from recache_compile.errors import ModelError
from recache_compile.pipelines.transformer import CompiledTransformer

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
        ModelError: the pipeline has no such component, or there is nothing to fall back to.
    """
    parts = {compiled.engines.config.component: compiled} if isinstance(compiled, Compiled) else dict(compiled)
    if fallback not in (None, "eager"):
        raise ModelError(f"fallback {fallback!r} is unknown; choose 'eager' or None")
    transformers = {}
    for name, each in parts.items():
        if not hasattr(pipeline, name):
            raise ModelError(f"{type(pipeline).__name__}: has no component {name} whose place could be taken")
        original = getattr(pipeline, name)
        if isinstance(original, CompiledTransformer):
            original = original.original
        if fallback and original is None:
            raise ModelError(
                f"fallback 'eager' needs the original weights, but the pipeline has no {name} of its own any more; put"
                f" the original back (pipeline.{name} = ...) or accelerate with the fallback at once"
            )
        chosen = min(each.plans) if budget is None else budget
        transformers[name] = CompiledTransformer(each, pipeline, chosen, original if fallback else None)
    for name, transformer in transformers.items():
        setattr(pipeline, name, transformer)
    _accept_budget(pipeline)
    return pipeline


def _accept_budget(pipeline: Any) -> None:
    """Give the pipeline's call a `budget`, and let its transformers know where a generation begins."""
    base = getattr(type(pipeline), "_recache_base", type(pipeline))

    @functools.wraps(base.__call__)
    def call(self: Any, *args: Any, budget: int | None = None, **kwargs: Any) -> Any:
        transformers = [each for each in self.components.values() if isinstance(each, CompiledTransformer)]
        if budget is not None and not transformers:
            raise ModelError(f"budget {budget}: {base.__name__} has its own transformer again; accelerate it anew")
        with contextlib.ExitStack() as stack:
            for each in transformers:
                stack.enter_context(each.generation(self, budget))
            return base.__call__(self, *args, **kwargs)

    pipeline.__class__ = type(
        base.__name__, (base,), {"__call__": call, "_recache_base": base, "__module__": base.__module__}
    )
