"""The methods of pipelines for LoRA, on a pipeline that runs on engines: they change its own transformers."""

import contextlib
import copy
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import nn

from recache_compile.capture.compat import is_offloaded
from recache_compile.errors import ModelError
from recache_compile.pipelines.adapters import changing
from recache_compile.pipelines.transformer import CompiledTransformer

CHANGING = (
    *("load_lora_weights", "unload_lora_weights", "fuse_lora", "unfuse_lora", "set_adapters", "delete_adapters"),
    *("disable_lora", "enable_lora", "set_lora_device", "enable_lora_hotswap"),
)
"""Methods of pipelines that change adapters."""

READING = ("get_active_adapters", "get_list_adapters")
"""Methods of pipelines that look at them."""

_EXPANDING = "_maybe_expand_transformer_param_shape_or_error_"
"""Method of FLUX's pipelines that makes layers wider where those of an adapter are, and is called before any change."""

_FILES = "lora_state_dict"
"""Method of pipelines that downloads adapters, reads them, and changes nothing."""

_NORMS = "_load_norm_into_transformer"
"""Method of theirs that replaces the weights of norms."""

_NOTHING = object()


def compiled_transformers(pipeline: Any) -> dict[str, CompiledTransformer]:
    """The components of a pipeline that run on engines, by name."""
    return {name: each for name, each in vars(pipeline).items() if isinstance(each, CompiledTransformer)}


def view_with(pipeline: Any, components: Mapping[str, Any]) -> Any:
    """A copy of a pipeline with other components in the place of some."""
    view = copy.copy(pipeline)
    for name, each in components.items():
        setattr(view, name, each)
    return view


def adapting(name: str, method: Any) -> Any:
    """A method of pipelines that looks at adapters or changes them, for those that run on engines.

    Args:
        name: of the method.
        method: as `diffusers` has it.
    """

    @functools.wraps(method)
    def adapt(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not (installed := compiled_transformers(self)):
            return method(self, *args, **kwargs)
        if name in READING:
            return method(view_with(self, {part: each.original for part, each in installed.items()}), *args, **kwargs)
        view = _with_originals(self, name, installed)
        before = dict(vars(view))
        with contextlib.ExitStack() as stack:

            def begin() -> None:
                stack.enter_context(_changed(view, name, installed))

            if _reads_files(method):
                _begin_after_files(view, begin)
            else:
                begin()
            result = method(view, *args, **kwargs)
        changed = {part: value for part, value in vars(view).items() if value is not before.get(part, _NOTHING)}
        vars(self).update({part: value for part, value in changed.items() if part != "_internal_dict"})
        return result

    return adapt


def _reads_files(method: Any) -> bool:
    """Whether a method of pipelines reads files before it changes anything, as those of `diffusers` do."""
    return _FILES in inspect.unwrap(method).__code__.co_names


def _begin_after_files(view: Any, begin: Callable[[], None]) -> None:
    """Let a change begin once a pipeline has read its files: generations go on during a download."""
    read = getattr(view, _FILES)

    def read_and_begin(*args: Any, **kwargs: Any) -> Any:
        del vars(view)[_FILES]
        found = read(*args, **kwargs)
        begin()
        return found

    vars(view)[_FILES] = read_and_begin


def _with_originals(pipeline: Any, method: str, installed: Mapping[str, CompiledTransformer]) -> Any:
    """The pipeline with its own transformers."""
    originals: dict[str, nn.Module] = {}
    for name, each in installed.items():
        if each.original is None:
            raise ModelError(
                f"{method}: the pipeline has no {name} of its own that could take adapters; load it with its {name},"
                " and accelerate it again"
            )
        originals[name] = each.original
    if method == "load_lora_weights":
        _check_not_offloaded(pipeline)
    view = view_with(pipeline, originals)
    vars(view).update({_EXPANDING: _refuse_wider, _NORMS: _refuse_norms} if hasattr(view, _EXPANDING) else {})
    return view


@contextlib.contextmanager
def _changed(view: Any, method: str, installed: Mapping[str, CompiledTransformer]) -> Iterator[None]:
    """Inside, the adapters of a pipeline's own transformers are changed; engines follow, or nothing changes."""
    originals = [getattr(view, name) for name in installed]
    parts = [part for name in view._lora_loadable_modules if isinstance(part := getattr(view, name, None), nn.Module)]

    def follow() -> None:
        for each in installed.values():
            each.follow_adapters()

    with contextlib.ExitStack() as stack:
        for each in sorted(installed.values(), key=lambda each: id(each.compiled.engines)):
            stack.enter_context(each.compiled.engines.alone())
        stack.enter_context(changing(originals, parts, method == "fuse_lora", follow))
        yield


def _check_not_offloaded(pipeline: Any) -> None:
    """Raise `ModelError` where `diffusers` would move the components to load adapters."""
    if any(is_offloaded(part) for part in pipeline.components.values()):
        raise ModelError(
            "load_lora_weights: the pipeline is offloaded; call remove_all_hooks(), load the adapter, and offload it"
            " again"
        )


def _refuse_wider(transformer: nn.Module, lora: Mapping[str, Any], norms: Mapping[str, Any] | None = None) -> bool:
    """Raise `ModelError` where an adapter needs another transformer: wider layers, or other norms."""
    if norms:
        _refuse_norms(norms)
    for name, layer in transformer.named_modules():
        plain = name.replace(".base_layer", "")
        into, out = (lora.get(f"transformer.{plain}.lora_{end}.weight") for end in "AB")
        if not isinstance(layer, nn.Linear) or into is None or out is None:
            continue
        given = out.shape[0], into.shape[1]
        if given[0] > layer.out_features or given[1] > layer.in_features:
            raise ModelError(
                f"load_lora_weights: makes {plain} {list(given)}, compiled [{layer.out_features}, {layer.in_features}]"
                "; rc.restore(pipeline), load it, and compile"
            )
    return False


def _refuse_norms(norms: Mapping[str, Any], *_: Any, **__: Any) -> None:
    """Raise `ModelError`: weights are replaced."""
    raise ModelError(
        f"load_lora_weights: {min(norms)} replaces a weight, which engines do not follow; rc.restore(pipeline), load"
        " it, and compile"
    )
