"""What adapters (LoRA and others that `peft` puts into a module) make of the weights of its layers."""

import contextlib
import copy
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from recache_compile.errors import CaptureError, ModelError

ATTENTION_KWARGS = ("joint_attention_kwargs", "attention_kwargs", "cross_attention_kwargs")
"""Arguments of models in which pipelines hand on the strength of adapters, as "scale"."""

STRENGTH = "scale"
"""What the strength is called there."""

CHUNK = 1 << 20
"""Elements of a weight in half precision that are computed at a time."""


def adapted_layers(module: nn.Module) -> dict[str, Any]:
    """The layers that `peft` has put around others, by the names of these others in the plain module.

    Raises:
        ModelError: one of them is no layer whose weights a merge could give.
    """
    found: dict[str, Any] = {}
    for name, child in module.named_modules():
        if hasattr(child, "modules_to_save") and hasattr(child, "original_module"):
            raise ModelError(f"adapters: {name} is replaced by a module of the adapter, which no weights can stand for")
        if not hasattr(child, "base_layer"):
            continue
        if hasattr(child.base_layer, "base_layer") or not callable(getattr(child, "merge", None)):
            what = "has adapters of two kinds" if hasattr(child.base_layer, "base_layer") else "cannot be merged"
            raise ModelError(f"adapters: {name}, a {type(child).__name__}, {what}; load one that is a LoRA")
        found[name] = child
    return found


def active_adapters(layer: Any) -> tuple[str, ...]:
    """The adapters that change what a layer computes; none where they are off, or merged into its own weights."""
    if layer.disable_adapters or layer.merged:
        return ()
    kinds = [getattr(layer, name) for name in layer.adapter_layer_names]
    return tuple(name for name in layer.active_adapters if any(name in kind for kind in kinds))


def changed_weights(layer: Any) -> tuple[str, ...]:
    """The parameters of the layer inside that active adapters change."""
    if not active_adapters(layer):
        return ()
    return (
        ("weight",) if _is_a_sum(layer) else tuple(name for name, _ in layer.base_layer.named_parameters(recurse=False))
    )


@torch.no_grad()
def merge(layer: Any, strength: float, base: Mapping[str, Tensor], out: Mapping[str, Tensor]) -> None:
    """Write what the active adapters of a layer make of its weights: computed in float32 or better, then rounded.

    Args:
        layer: around another one; it is left as it is.
        strength: of all adapters, in addition to that which they have.
        base: the parameters without adapters, those of `changed_weights`.
        out: written to; of the same names, shapes and types.
    """
    if _is_a_product(layer):
        _add_products(layer, strength, base["weight"], out["weight"])
        return
    if _is_a_sum(layer):
        total = base["weight"].to(out["weight"].device, _exact(base["weight"].dtype))
        for name in active_adapters(layer):
            total = total + strength * layer.get_delta_weight(name).to(total.device, total.dtype)
        out["weight"].copy_(total)
        return
    merged = copy.deepcopy(layer)
    for name, tensor in base.items():
        setattr(merged.base_layer, name, nn.Parameter(tensor.detach().clone(), False))
    if any(tensor.element_size() < 4 for tensor in base.values()):
        merged.float()
    if strength != 1.0:
        merged.scale_layer(strength)
    merged.merge()
    for name, tensor in out.items():
        tensor.copy_(getattr(merged.base_layer, name))


def _exact(dtype: torch.dtype) -> torch.dtype:
    """What sums of a type are computed in."""
    return torch.promote_types(dtype, torch.float32)


def _add_products(layer: Any, strength: float, base: Tensor, out: Tensor) -> None:
    """The weight and the product of two factors for each adapter: `get_delta_weight` without memory of its own.

    Memory that is new for each layer would take longer than all of the arithmetic.
    """
    names, dtype = active_adapters(layer), _exact(base.dtype)
    up = torch.cat([layer.lora_B[name].weight.to(out.device, dtype) * layer.scaling[name] for name in names], 1)
    down = torch.cat([layer.lora_A[name].weight.to(out.device, dtype) for name in names])
    rows = len(out) if out.dtype == dtype else max(1, CHUNK // out.shape[1])
    for at in range(0, len(out), rows):
        here, place = base[at : at + rows].to(out.device, dtype), out[at : at + rows]
        total = torch.addmm(here, up[at : at + rows], down, alpha=strength, out=place if out.dtype == dtype else None)
        if out.dtype != dtype:
            place.copy_(total)


def _is_a_product(layer: Any) -> bool:
    """Whether it is a sum, and each change is a product of two factors."""
    from peft.tuners.lora.layer import Linear

    return isinstance(layer, Linear) and not layer.fan_in_fan_out and _is_a_sum(layer)


def _is_a_sum(layer: Any) -> bool:
    """Whether the merged weight is the weight and a change for each adapter, and nothing else changes."""
    from peft.tuners.lora.layer import Embedding, Linear, _ConvNd

    names = active_adapters(layer)
    biased, variant = getattr(layer, "lora_bias", {}), getattr(layer, "lora_variant", {})
    plain = not any(biased.get(name) or name in variant for name in names)
    return plain and isinstance(layer, Embedding | Linear | _ConvNd)


@contextlib.contextmanager
def fused_adapters(module: nn.Module, scale: float = 1.0) -> Iterator[None]:
    """Put plain layers, with the active adapters merged into their weights, in the place of adapted ones.

    The module's own layers are neither changed nor lost: they are back afterwards.  What is
    captured meanwhile has the names of the plain module, so that `Compiled.refit` takes a
    plain state dict.

    Args:
        module: with or without adapters.
        scale: strength of all of them, in addition to that which they have.

    Raises:
        ModelError: one of them cannot be merged.
    """
    adapted = adapted_layers(module)
    try:
        for name, layer in adapted.items():
            module.set_submodule(name, _merged(layer, scale))
        yield
    finally:
        for name, layer in adapted.items():
            module.set_submodule(name, layer)


def _merged(layer: Any, scale: float) -> nn.Module:
    """The layer inside, with the active adapters merged into its weights where there are any."""
    base: nn.Module = layer.base_layer
    if not (names := changed_weights(layer)):
        return base
    fused = copy.copy(base)
    fused._parameters = dict(base._parameters)
    before = {name: base.get_parameter(name).detach() for name in names}
    after = {name: torch.empty_like(tensor) for name, tensor in before.items()}
    merge(layer, scale, before, after)
    for name, tensor in after.items():
        setattr(fused, name, nn.Parameter(tensor, False))
    return fused


def fused_names(module: nn.Module) -> tuple[str, ...]:
    """The weights of a module that `fused_adapters` changes."""
    layers = adapted_layers(module)
    return tuple(f"{name}.{own}" for name, layer in layers.items() for own in changed_weights(layer))


def strength_of(arguments: Mapping[str, Any]) -> float:
    """The strength of adapters that a call of a model asks for, as the pipelines of `diffusers` pass it.

    Raises:
        CaptureError: it is no number.
    """
    for name in ATTENTION_KWARGS:
        if isinstance(kwargs := arguments.get(name), Mapping) and STRENGTH in kwargs:
            strength = kwargs[STRENGTH]
            if isinstance(strength, bool) or not isinstance(strength, (int, float)):
                raise CaptureError(f"adapters: {name} has the strength {strength!r:.40}; expected a number")
            return float(strength)
    return 1.0


def adapter_scale(calls: Iterable[Mapping[str, Any]]) -> float:
    """The strength of adapters that calls ask for.

    Args:
        calls: arguments of the model, for each kind of call.

    Raises:
        CaptureError: they ask for several, which one set of weights cannot have.
    """
    found = {strength_of(arguments) for arguments in calls} or {1.0}
    if len(found) > 1:
        raise CaptureError(
            f"adapters: the calls ask for the strengths {', '.join(map(str, sorted(found)))}; compile one at a time"
        )
    return found.pop()
