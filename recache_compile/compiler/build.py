"""The compiler: from a model to engines.  `build_engines` reads as the design's picture."""

import contextlib
import json
import logging
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from recache_compile.capture.adapters import adapter_scale, fused_adapters, fused_names
from recache_compile.capture.capture import Captured, capture
from recache_compile.capture.check import check_modes, check_program, check_stateless, check_untouched
from recache_compile.capture.processors import PROCESSORS, under_processors
from recache_compile.capture.roles import usual_role
from recache_compile.compiler.compiled import Description, Engines
from recache_compile.compiler.examples import Example, check_timesteps, distinct
from recache_compile.compiler.lowering import Lowering
from recache_compile.compiler.program_cache import Split, keep_split, read_split, split_key
from recache_compile.compiler.refit import hash_of_weight, tied_weights
from recache_compile.compiler.side_by_side import PROGRAMS, Helpers
from recache_compile.compiler.split import annotate, cache_points, describe_sites, specialise
from recache_compile.config import CompileConfig
from recache_compile.errors import CaptureError
from recache_compile.ir.cost import count_macs
from recache_compile.ir.program import Program, dtype_name
from recache_compile.ir.signature import named_leaves
from recache_compile.ir.value import Kind
from recache_compile.runtimes._cuda_graphs import check_graphs
from recache_compile.runtimes.base import Runtime, Variant
from recache_compile.runtimes.registry import get_runtime

log = logging.getLogger(__name__)


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
    with fused_adapters(module, adapter_scale(each.inputs for each in examples)):
        captures = capture_examples(module, distinct(examples), config)
        state = dict(module.state_dict())
    annotated = [annotate(captured, config) for _, captured in captures]
    check_same_model([captured for _, captured in captures], annotated)
    log.info(describe_sites(annotated[0]))
    keep = tempfile.TemporaryDirectory(prefix="recache-")
    lowering = Lowering(backend, Path(keep.name), Helpers(backend, examples[0].device, PROGRAMS + config.batching))
    with contextlib.closing(lowering.helpers):
        variants = tuple(
            build_variant(example, captured, program, config, lowering)
            for (example, captured), program in zip(captures, annotated, strict=True)
        )
    return Engines(
        description=describe(module, state, variants[0], config, backend, lowering, examples[0].levels),
        signature=captures[0][1].signature,
        variants=variants,
        weights=lowering.weights,
        folder=Path(keep.name),
        requirements=backend.build_requirements(variants[0].device),
        keep=keep,
    )


def build_variant(
    example: Example, captured: Captured, annotated: Program, config: CompileConfig, lowering: Lowering
) -> Variant:
    """The programs and engines of one kind of call."""
    timesteps = check_timesteps(example, captured.program, config.num_steps)
    key = split_key(captured.program, annotated, config)
    split = read_split(key, captured.program, example.device)
    if split is None:
        lowering.helpers.start()
        split = Split(specialise(annotated, config), count_macs(captured.program, example.device))
        keep_split(key, captured.program, split)
    return Variant(
        inputs=captured.program.inputs,
        constants=captured.constants,
        fixed=captured.fixed,
        device=example.device,
        programs=split.programs,
        engines=lowering.lower(split.programs, example.device),
        timesteps=timesteps,
        macs=split.macs,
    )


def capture_examples(
    module: nn.Module, examples: Iterable[Example], config: CompileConfig
) -> list[tuple[Example, Captured]]:
    """Capture every example, and once more for each call with other values of inputs that became constants."""
    captures: list[tuple[Example, Captured]] = []
    for number, example in enumerate(examples):
        own: list[Captured] = []
        for inputs in (example.inputs, *example.others):
            leaves = named_leaves(inputs)
            if any(all(torch.equal(leaves[name], value) for name, value in each.fixed.items()) for each in own):
                continue
            log.info("capturing")
            label = f"{number}_{len(own)}" if own else str(number)  # tells the constants of several apart
            roles, who = {**example.roles, **config.roles}, type(module).__name__
            latents = [name for name in leaves if roles.get(name, usual_role(name)) == Kind.LATENTS]
            with under_processors(module, example.processors):
                check_stateless(module, inputs, latents, who)
                captured = capture(module, inputs, roles, label)
                check_program(module, inputs, captured, who)
            if example.attention:
                constants = (*captured.constants, (PROCESSORS, repr(example.attention)))
                captured = replace(captured, constants=constants)
            own.append(captured)
        captures += [(example, each) for each in own]
    return captures


def check_same_model(captures: Sequence[Captured], annotated: Sequence[Program]) -> None:
    """Raise `CaptureError` unless all examples have one result structure and the same number of cache sites."""
    if len({captured.signature for captured in captures}) > 1:
        raise CaptureError(
            "examples: the model returns another structure for one of them than for the first; compile apart"
        )
    first, *others = (len(cache_points(program)) for program in annotated)
    for found in others:
        if found != first:
            raise CaptureError(f"examples: one has {found} cache sites, the first has {first}; compile apart")


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
