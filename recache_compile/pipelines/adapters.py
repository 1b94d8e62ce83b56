"""Adapters of a transformer whose place engines have taken: its own methods change it, and engines follow.

The adapters are in the original module, put there by `diffusers` and `peft`, so whoever
shares it shares them.  Engines read what they make of its weights; the module's own weights,
whose memory engines share, are never written to.
"""

import contextlib
import copy
import itertools
import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from recache_compile.capture.adapters import active_adapters, adapted_layers, changed_weights, merge
from recache_compile.compiler.compiled import Description
from recache_compile.compiler.overlay import Change, Patch
from recache_compile.errors import ModelError

log = logging.getLogger(__name__)

FOLLOWED = (
    *("load_lora_adapter", "unload_lora", "fuse_lora", "unfuse_lora", "set_adapters", "disable_lora", "enable_lora"),
    *("delete_adapters", "add_adapter", "set_adapter", "disable_adapters", "enable_adapters", "enable_lora_hotswap"),
)
"""Methods of a transformer that change its adapters, which engines follow."""

_ATTRIBUTE = "_recache_adapters"
_CHANGING = threading.RLock()
"""One thread at a time changes adapters."""

_versions = itertools.count(1)


@dataclass(eq=False)
class Adapters:
    """What is known of a module's adapters: kept with the module, whoever shares it.

    Args:
        facts: what engines have to follow, as it was noticed last.
        version: another number whenever something has changed.
        active: whether it computes with adapters that have a strength.
        fused: whether it computes with some that were fused, whose strength is fixed.
        own: names of weights that the module has and engines may not: adapters were fused into them.
        before: the parameters whose place a fused one has taken, and whether it was the module's own before.
    """

    facts: Any = None
    version: int = 0
    active: bool = False
    fused: bool = False
    own: set[str] = field(default_factory=set)
    before: dict[str, tuple[nn.Parameter, bool]] = field(default_factory=dict)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """What is copied or unpickled is told apart from what it was copied from."""
        self.__dict__.update(state, version=next(_versions))


def adapters_of(module: nn.Module | None) -> Adapters | None:
    """What is known of a module's adapters; None where it has never had any."""
    return None if module is None else vars(module).get(_ATTRIBUTE)


def notice(module: nn.Module | None, changed: bool = False) -> None:
    """Look what adapters a module has.

    Args:
        module: the original.
        changed: whether weights of adapters may have changed as well, which is not looked at.

    Raises:
        ModelError: it has some that engines cannot follow.
    """
    if module is None:
        return
    layers, known = adapted_layers(module), adapters_of(module)
    if known is None:
        if not layers:
            return
        known = vars(module)[_ATTRIBUTE] = Adapters()
    merged = {f"{name}.{own}" for name, each in layers.items() if each.merged for own, _ in _parameters(each)}
    known.own |= merged - known.before.keys()
    facts = [
        (name, active_adapters(each), each.merged, repr(getattr(each, "scaling", None)))
        for name, each in layers.items()
    ]
    known.fused = any(each.merged for each in layers.values())
    if changed or facts != known.facts:
        known.facts, known.version = facts, next(_versions)


def patch_of(module: nn.Module, strength: float, description: Description) -> Patch:
    """What engines read in the place of their weights to compute what a module computes.

    Args:
        module: the original, with its adapters.
        strength: of all of them, in addition to that which they have.
        description: of the engines.

    Raises:
        ModelError: engines cannot compute that.
    """
    with _CHANGING:
        return _patch(module, strength, description)


def _patch(module: nn.Module, strength: float, description: Description) -> Patch:
    known = adapters_of(module)
    own = {*description.fused, *(known.own if known else ())} - description.unread.keys()
    changes: list[Change] = []
    made: set[str] = set()
    for name, layer in adapted_layers(module).items():
        names = {f"{name}.{each}": each for each in changed_weights(layer)}
        _check_names(names, description)
        read = {full: each for full, each in names.items() if full not in description.unread}
        if len(read) < len(names):
            log.info("adapters: no engine reads %s", ", ".join(names.keys() - read.keys()))
        if read:
            bases = {full: _weight(module, full) if full in own else None for full in read}
            changes.append(Change(bases, partial(_write, layer, strength, read)))
            made |= read.keys()
    return Patch({name: _weight(module, name) for name in own - made}, tuple(changes))


def _write(
    layer: Any, strength: float, names: Mapping[str, str], base: Mapping[str, Tensor], out: Mapping[str, Tensor]
) -> None:
    """Merge a layer's adapters; weights are named as in the module."""
    merge(
        layer,
        strength,
        {own: base[full].detach() for full, own in names.items()},
        {own: out[full] for full, own in names.items()},
    )


def _check_names(names: Iterable[str], description: Description) -> None:
    """Raise `ModelError` where engines have no such weight, or one for several layers."""
    shared = {*description.tied, *description.tied.values()}
    for name in names:
        if name not in description.weights:
            raise ModelError(f"adapters: {name} is no weight of what was compiled; rc.restore(pipeline), and compile")
        if name in shared:
            raise ModelError(f"adapters: {name} is shared with another layer, which has no adapter; compile with it")


def _weight(module: nn.Module, name: str) -> Tensor:
    """A parameter by its name in the plain module."""
    path, _, own = name.rpartition(".")
    layer = module.get_submodule(path)
    found = getattr(getattr(layer, "base_layer", layer), own)
    assert isinstance(found, Tensor)
    return found


def _parameters(layer: Any) -> list[tuple[str, nn.Parameter]]:
    """Those of the layer inside an adapted one."""
    return [*layer.base_layer.named_parameters(recurse=False)]


@contextlib.contextmanager
def changing(
    modules: Iterable[nn.Module], others: Iterable[nn.Module], fuses: bool, follow: Callable[[], None]
) -> Iterator[None]:
    """Inside, the adapters of modules are changed; where that fails, nothing has changed.

    Args:
        modules: the originals of transformers.
        others: other modules that may change meanwhile, such as text encoders.
        fuses: whether adapters are fused, into new parameters then.
        follow: lets engines follow, once they are changed.

    Raises:
        ModelError: the module has adapters then that engines cannot follow.
    """
    originals = list(modules)
    with _CHANGING, _all_or_nothing((*originals, *others)):
        for module in originals:
            notice(module)
            if fuses:
                _set_aside(module)
        yield
        for module in originals:
            _tidy(module)
            notice(module, changed=True)
        follow()


def _set_aside(module: nn.Module) -> None:
    """Give adapted layers other parameters to fuse into."""
    if (known := adapters_of(module)) is None:
        return
    for name, layer in adapted_layers(module).items():
        for own, parameter in _parameters(layer):
            if (full := f"{name}.{own}") not in known.before and not layer.merged:
                known.before[full] = parameter, full in known.own
                known.own.add(full)
                setattr(layer.base_layer, own, nn.Parameter(parameter.detach().clone(), False))


def _tidy(module: nn.Module) -> None:
    """Put the parameters back that nothing is fused into any more; what is fused for good has none to go back to."""
    if (known := adapters_of(module)) is None:
        return
    layers = adapted_layers(module)
    for layer in layers.values():
        if layer.merged and layer.disable_adapters:
            layer.unmerge()  # as its next call would
    for full, (parameter, before) in [*known.before.items()]:
        name, _, own = full.rpartition(".")
        if name not in layers:
            del known.before[full]
        elif not layers[name].merged:
            setattr(layers[name].base_layer, own, parameter)
            del known.before[full]
            known.own -= set() if before else {full}


@contextlib.contextmanager
def _all_or_nothing(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Where something fails inside, modules have the parts, parameters and settings again that they had before."""
    parts = {id(part): part for module in modules for part in module.modules()}.values()
    before = [(part, {name: _copied(value) for name, value in vars(part).items()}) for part in parts]
    try:
        yield
    except BaseException:
        for part, state in before:
            vars(part).clear()
            vars(part).update(state)
        raise


def _copied(value: Any) -> Any:
    """A container of its own, with the same contents."""
    if isinstance(value, Adapters):
        return replace(value, own=set(value.own), before=dict(value.before))
    return copy.copy(value) if type(value) in (dict, list, set) else value
