"""Let a `diffusers` pipeline run on compiled engines, and give it its own transformer back."""

import contextlib
import functools
import threading
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from recache_compile.capture.compat import uncompiled
from recache_compile.capture.processors import processors_of, under_processors
from recache_compile.compiler.compiled import Compiled
from recache_compile.errors import ModelError
from recache_compile.pipelines.lora import CHANGING, READING, adapting, compiled_transformers, view_with
from recache_compile.pipelines.record import check_scheduler
from recache_compile.pipelines.transformer import CompiledTransformer

Fallback = Literal["eager"]

FROZEN = (
    *("load_ip_adapter", "unload_ip_adapter", "set_ip_adapter_scale"),
    *("fuse_qkv_projections", "unfuse_qkv_projections"),
)
"""Methods of pipelines that change what its transformer computes, which engines do not follow."""

PERTURB = "_set_pag_attn_processor"
"""Method of pipelines with perturbed-attention guidance that sets attention processors for a call."""

_PERTURBING = threading.Lock()
"""One thread at a time looks which layers a pipeline perturbs."""


def install(
    pipeline: Any,
    compiled: Compiled | Mapping[str, Compiled],
    budget: float | None = None,
    fallback: Fallback | None = None,
) -> Any:
    """Put compiled engines in the place of a pipeline's transformers; see `recache_compile.accelerate`.

    Raises:
        DispatchError: there is no plan for the budget.
        ModelError: the pipeline has no such component, or there is nothing to fall back to.
    """
    parts = {compiled.engines.config.component: compiled} if isinstance(compiled, Compiled) else dict(compiled)
    if fallback not in (None, "eager"):
        raise ModelError(f"fallback {fallback!r} is unknown; choose 'eager' or None")
    check_scheduler(pipeline)
    if not parts:
        raise ModelError("accelerate: no compiled transformer is given; leave it out to compile now")
    transformers: list[tuple[Any, str, CompiledTransformer]] = []
    for name, each in parts.items():
        if not hasattr(pipeline, name):
            raise ModelError(f"{type(pipeline).__name__}: has no component {name} whose place could be taken")
        original = getattr(pipeline, name)
        if isinstance(original, CompiledTransformer):
            original = original.original
        _check_belongs(each, name, original, type(pipeline).__name__)
        if fallback and original is None:
            raise ModelError(
                f"fallback 'eager' needs the original weights, but the pipeline has no {name} of its own; load it with"
                f" its {name}, or put one there (pipeline.{name} = ...)"
            )
        chosen = min(each.plans) if budget is None else budget
        for one in (pipeline, *_inner_with(pipeline, name, original)):
            made = CompiledTransformer(each, one, chosen, original, falls_back=fallback is not None)
            transformers.append((one, name, made))
    for one, name, transformer in transformers:
        put_in(one, {name: transformer})
    return pipeline


def restore(pipeline: Any) -> Any:
    """Give a pipeline its own transformers back, in place.

    Raises:
        ModelError: it runs on no engines, or had no transformer of its own.
    """
    installed = compiled_transformers(pipeline) if hasattr(pipeline, "__dict__") else {}
    if not installed:
        raise ModelError(f"{_own_class(pipeline).__name__}: runs on no engines; there is nothing to restore")
    for name, transformer in installed.items():
        if transformer.original is None:
            raise ModelError(
                f"{_own_class(pipeline).__name__}: had no {name} of its own that could be given back; set one"
                f" (pipeline.{name} = ...), or load the pipeline again"
            )
    for one, found in _accelerated(pipeline):
        _give_back(one, found)
    return pipeline


def _accelerated(pipeline: Any) -> list[tuple[Any, dict[str, CompiledTransformer]]]:
    """A pipeline and those inside of it that run on engines for the same transformers, with what they have of them."""
    own = compiled_transformers(pipeline)
    originals_here = {id(each.original) for each in own.values() if each.original is not None}
    inside = [
        (
            inner,
            {name: each for name, each in compiled_transformers(inner).items() if id(each.original) in originals_here},
        )
        for inner in inner_pipelines(pipeline)
    ]
    return [(one, found) for one, found in ((pipeline, own), *inside) if found]


def _give_back(pipeline: Any, installed: Mapping[str, CompiledTransformer]) -> None:
    """Put the originals in the place of these; the class is that of diffusers where no engines are left."""
    for name, transformer in installed.items():
        setattr(pipeline, name, transformer.original)
    if not compiled_transformers(pipeline):
        pipeline.__class__ = _own_class(pipeline)


def put_in(pipeline: Any, transformers: Mapping[str, CompiledTransformer]) -> None:
    """Let a pipeline run on these."""
    for name, transformer in transformers.items():
        setattr(pipeline, name, transformer)
    pipeline.__class__ = accelerated_class(_own_class(pipeline))


def _adopt(pipeline: Any) -> None:
    """Let a pipeline that was made of an accelerated one's components be accelerated, too."""
    kind: Any = type(pipeline)
    if _own_class(pipeline) is kind:
        pipeline.__class__ = accelerated_class(kind)


CompiledTransformer.adopt = staticmethod(_adopt)


def inner_pipelines(pipeline: Any) -> list[Any]:
    """The pipelines that a pipeline is made of, where it is (VisualCloze draws with one and enlarges with another)."""
    return [each for each in vars(pipeline).values() if hasattr(type(each), "components")]


def _check_belongs(compiled: Compiled, name: str, original: Any, who: str) -> None:
    """Raise `ModelError` where engines were compiled for another component, or for another class of model."""
    if compiled.engines.config.component != name:
        raise ModelError(
            f"{who}: these engines were compiled for a {compiled.engines.config.component}, not for its {name}; compile"
            f" with component={name!r}"
        )
    found = type(uncompiled(original))
    if original is not None and compiled.description.model_class != f"{found.__module__}.{found.__qualname__}":
        raise ModelError(
            f"{who}: its {name} is a {found.__qualname__}, the engines are those of a"
            f" {compiled.description.model_class.rpartition('.')[2]}; accelerate it with what was compiled from it"
        )


def _has_restored_inside(pipeline: Any) -> bool:
    """Whether one of the pipelines inside calls a transformer itself that others have engines for."""
    own = compiled_transformers(pipeline)
    return any(
        getattr(inner, name, None) is each.original
        for inner in inner_pipelines(pipeline)
        for name, each in own.items()
        if each.original is not None
    )


def _inner_with(pipeline: Any, name: str, transformer: Any) -> list[Any]:
    """Those that call this very transformer, or that lack theirs as this one does."""

    def own(inner: Any) -> Any:
        found = getattr(inner, name)
        return found.original if isinstance(found, CompiledTransformer) else found

    inside = [inner for inner in inner_pipelines(pipeline) if hasattr(inner, name)]
    if transformer is None and any(own(inner) is not None for inner in inside):
        raise ModelError(
            f"{type(pipeline).__name__}: has no {name} of its own, but a pipeline inside of it has; give both the same"
        )
    return [inner for inner in inside if own(inner) is transformer]


def _own_class(pipeline: Any) -> Any:
    """The pipeline's class as `diffusers` has it."""
    return getattr(type(pipeline), "_recache_base", type(pipeline))


@functools.cache
def accelerated_class(base: Any) -> Any:
    """A pipeline class whose call takes a `budget` and lets its transformers know where a generation begins.

    Its pipelines can be pickled, copied and saved.
    """

    @functools.wraps(base.__call__)
    def call(self: Any, *args: Any, budget: float | None = None, **kwargs: Any) -> Any:
        transformers = compiled_transformers(self).values()
        if (budget is not None and not transformers) or _has_restored_inside(self):
            what = "" if budget is None else f"budget {budget}: "
            raise ModelError(f"{what}{base.__name__} has its own transformer again; accelerate it anew")
        with contextlib.ExitStack() as stack:
            for each in transformers:
                stack.enter_context(each.generation(self, budget))
            for _, found in _accelerated(self)[1:]:
                for name, each in found.items():
                    outer = getattr(self, name).budget
                    usual = outer if each.knows(outer) else None
                    stack.enter_context(each.under(usual if budget is None else budget))
            return base.__call__(self, *args, **kwargs)

    @functools.wraps(base.save_pretrained)
    def save_pretrained(self: Any, *args: Any, **kwargs: Any) -> Any:
        with originals(self):
            return base.save_pretrained(self, *args, **kwargs)

    def reduce(self: Any, protocol: Any) -> Any:
        return _new_accelerated, (base,), dict(vars(self))

    members: dict[str, Any] = {name: _refusing(name, getattr(base, name)) for name in FROZEN if hasattr(base, name)}
    members |= {name: adapting(name, getattr(base, name)) for name in (*CHANGING, *READING) if hasattr(base, name)}
    if hasattr(base, PERTURB):
        members[PERTURB] = _perturbing(base)
    members |= {
        "__call__": call,
        "save_pretrained": save_pretrained,
        "__reduce_ex__": reduce,
        "_recache_base": base,
        "__module__": base.__module__,
        "__doc__": base.__doc__,
    }
    return type(base.__name__, (base,), members)


def _perturbing(base: Any) -> Any:
    """The method of perturbed-attention guidance that looks for layers of the transformer, and finds them."""
    method = getattr(base, PERTURB)

    @functools.wraps(method)
    def perturb(self: Any, *args: Any, **kwargs: Any) -> None:
        installed = compiled_transformers(self)
        for name, transformer in installed.items():
            if transformer.architecture is None:
                raise ModelError(
                    f"{base.__name__}: perturbed-attention guidance looks for layers of the {name}, and there is none"
                    " here to look at; load the pipeline with it, or call without (pag_scale=0)"
                )
        view = view_with(self, {name: each.architecture for name, each in installed.items()})
        with _PERTURBING, contextlib.ExitStack() as stack:
            for transformer in installed.values():
                stack.enter_context(under_processors(transformer.architecture, transformer.attn_processors))
            method(view, *args, **kwargs)
            for transformer in installed.values():
                transformer.set_attn_processor(processors_of(transformer.architecture))

    return perturb


def _refusing(name: str, method: Any) -> Any:
    """A method that says what to do instead."""

    @functools.wraps(method)
    def refuse(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not compiled_transformers(self):
            return method(self, *args, **kwargs)
        raise ModelError(
            f"{name}: the engines hold what was there when they were compiled; rc.restore(pipeline), change it, and"
            " compile again (new values of the same weights: compiled.refit)"
        )

    return refuse


def _new_accelerated(base: Any) -> Any:
    """A pipeline without its components, which unpickling and copying put there."""
    kind = accelerated_class(base)
    return kind.__new__(kind)


@contextlib.contextmanager
def originals(pipeline: Any) -> Iterator[None]:
    """For a while, a pipeline has its own transformers: to be saved (engines are, by `Compiled.save`) or compiled.

    Raises:
        ModelError: it had none.
    """
    installed = compiled_transformers(pipeline)
    if lost := [name for name, each in installed.items() if each.original is None]:
        raise ModelError(
            f"{_own_class(pipeline).__name__}: has no weights of its own {lost[0]} to save; save the engines with"
            f" compiled.save(FOLDER), or load the pipeline with its {lost[0]}"
        )
    accelerated = _accelerated(pipeline)
    try:
        for one, found in accelerated:
            _give_back(one, found)
        yield
    finally:
        for one, found in accelerated:
            put_in(one, found)
