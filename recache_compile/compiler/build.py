"""The compiler: from a model to engines.  `build_engines` reads as the design's picture."""

import contextlib
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor, nn

from recache_compile.capture.adapters import adapter_scale, fused_adapters, fused_names
from recache_compile.capture.check import check_modes, check_untouched
from recache_compile.compiler.captures import Capturing, Part
from recache_compile.compiler.compiled import Description, Engines
from recache_compile.compiler.examples import Example, check_timesteps, distinct
from recache_compile.compiler.lowering import Lowering
from recache_compile.compiler.refit import hash_of_weight, tied_weights
from recache_compile.compiler.side_by_side import PROGRAMS, Helpers
from recache_compile.config import CompileConfig
from recache_compile.ir.program import dtype_name
from recache_compile.ir.value import Kind
from recache_compile.runtimes._cuda_graphs import check_graphs
from recache_compile.runtimes.base import Runtime, Variant, bounds_of
from recache_compile.runtimes.registry import get_runtime


def build_engines(
    module: nn.Module, examples: Sequence[Example], config: CompileConfig, runtime: Runtime | None = None
) -> Engines:
    """Capture, annotate, split and verify, lower.

    Args:
        module: the model; it is left as it is.
        examples: calls at the shapes to build for.
        config: the choices; `dtype` and `device` are those of the examples.
        runtime: a backend with options of its own, instead of the one that `config` names.

    Raises:
        RecacheError: naming what cannot be done and the remedy.
    """
    backend = get_runtime(config.runtime) if runtime is None else runtime
    backend.require_on(examples[0].device)
    if config.cuda_graphs:
        check_graphs(backend, examples[0].device)
    check_modes()
    check_untouched(module, type(module).__name__)
    keep = tempfile.TemporaryDirectory(prefix="recache-")
    lowering = Lowering(backend, Path(keep.name), Helpers(backend, examples[0].device, PROGRAMS + config.batching))
    with contextlib.closing(lowering.helpers):
        with fused_adapters(module, adapter_scale(each.inputs for each in examples)):
            parts = Capturing(module, config, lowering.helpers).parts(distinct(examples))
            state = dict(module.state_dict())
        variants = tuple(build_variant(part, config, lowering) for part in parts)
    return Engines(
        description=describe(module, state, variants[0], config, backend, lowering, examples[0].levels),
        signature=parts[0].captured.signature,
        variants=variants,
        weights=lowering.weights,
        folder=Path(keep.name),
        requirements=backend.build_requirements(variants[0].device),
        keep=keep,
    )


def build_variant(part: Part, config: CompileConfig, lowering: Lowering) -> Variant:
    """The programs and engines of one kind of call."""
    example, captured = part.example, part.captured
    timesteps = check_timesteps(example, captured.program, config.num_steps)
    split = part.split
    fixed = {value.name for value in captured.program.inputs if not value.free}
    return Variant(
        inputs=captured.program.inputs,
        constants=captured.constants,
        fixed=captured.fixed,
        device=example.device,
        programs=split.programs,
        engines=lowering.lower(split.programs, example.device),
        timesteps={name: column for name, column in timesteps.items() if name in fixed},
        macs=split.macs,
        conditions=captured.conditions,
        bounds=bounds_of(captured.program, lowering.runtime),
    )


def describe(
    module: nn.Module,
    state: Mapping[str, Tensor],
    variant: Variant,
    config: CompileConfig,
    runtime: Runtime,
    lowering: Lowering,
    levels: tuple[float, ...],
) -> Description:
    """What was compiled; `state` is the module's state dict, adapters merged."""
    latents = next(value for value in variant.inputs if value.kind is Kind.LATENTS)
    tied = {name: first for name, first in tied_weights(module).items() if name in state and first in lowering.weights}
    read = lowering.weights.keys() | tied.keys()
    return Description(
        model=type(module).__name__,
        model_class=f"{type(module).__module__}.{type(module).__qualname__}",
        model_config=json.loads(json.dumps(dict(getattr(module, "config", {})), default=str)),
        config=config.resolved(runtime.name, dtype_name(latents.dtype), str(variant.device)),
        weights=tuple(state),
        unread={name: hash_of_weight(weight) for name, weight in state.items() if name not in read},
        tied=tied,
        levels=levels,
        fused=fused_names(module),
    )
