"""From the files of an artifact, known to be whole, to engines and plans."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from recache_compile.artifact.asks import restore_policy
from recache_compile.artifact.manifest import WEIGHTS, Manifest
from recache_compile.compiler.compiled import Compiled, Engines
from recache_compile.compiler.planner import Planner
from recache_compile.errors import ArtifactError
from recache_compile.ir.forecasters import get_forecaster
from recache_compile.ir.plan import Plan, StepPlan
from recache_compile.ir.program import Program
from recache_compile.ir.schedule import Schedule
from recache_compile.ir.serialize import program_from_json, read_value, weights_named
from recache_compile.runtimes._offload import on_host
from recache_compile.runtimes.base import Engine, Variant, bounds_of
from recache_compile.runtimes.registry import known_runtime

MakeEngine = Callable[[int, Program, Mapping[str, Tensor], set[str]], Engine]


def restore(
    folder: Path, manifest: Manifest, device: torch.device, engine: MakeEngine, offloaded: str | None = None
) -> Compiled:
    """All that an artifact holds, from files that are known to be whole.

    Args:
        folder: of the artifact.
        manifest: of the artifact.
        device: where its weights go.
        engine: makes one, of a variant's number, a program, the weights, and which of them
            are not on the device.
        offloaded: name of the program whose own weights stay in the host's memory.
    """
    texts = {
        (number, name): (folder / program_file(number, name)).read_text(encoding="utf-8")
        for number, facts in enumerate(manifest.variants)
        for name in facts.programs
    }
    away: set[str] = set()
    if offloaded:
        reads = [(name == offloaded, weights_named(text)) for (_, name), text in texts.items()]
        others = set[str]().union(*(names for is_it, names in reads if not is_it))
        away = set[str]().union(*(names for is_it, names in reads if is_it)) - others
    tensors = _read_tensors(folder / WEIGHTS, device, away)
    weights = _under("weights/", tensors)
    variants = []
    for number, facts in enumerate(manifest.variants):
        programs = {
            name: _program(text, weights, device, folder / program_file(number, name))
            for (at, name), text in texts.items()
            if at == number
        }
        variants.append(
            Variant(
                inputs=tuple(read_value(entry) for entry in facts.inputs),
                constants=facts.constants,
                fixed=_under(f"fixed/{number}/", tensors),
                device=device,
                programs=programs,
                engines={name: engine(number, program, weights, away) for name, program in programs.items()},
                timesteps=_under(f"timesteps/{number}/", tensors),
                macs=facts.macs,
                conditions=facts.conditions,
                bounds=bounds_of(programs["recompute"], known_runtime(manifest.description.config.runtime)),
            )
        )
        if variants[-1].unmet({value.name: value.shape for value in variants[-1].inputs}):
            raise ArtifactError("the manifest names sizes that do not go together; compile again")
    description, stored = manifest.description, manifest.forecaster
    forecaster = get_forecaster(stored.name, stored.order, stored.gram or None)
    plans = {
        budget: Plan(Schedule(plan.recompute_steps, len(plan.steps)), plan.steps, forecaster)
        for budget, plan in manifest.plans.items()
    }
    check_plans(plans, variants, description.config.num_steps)
    engines = Engines(description, manifest.signature, tuple(variants), weights, folder, manifest.requirements)
    asked = restore_policy(manifest.asks, folder, description.config.num_steps)
    planner = Planner(plans, forecaster, engines.num_sites, description.levels, *asked)
    return Compiled(engines, planner, manifest.policy)


def with_config(compiled: Compiled, **choices: Any) -> Compiled:
    """The same with other choices of its configuration, which change no engine."""
    engines = compiled.engines
    config = replace(engines.config, **choices)
    return replace(compiled, engines=replace(engines, description=replace(engines.description, config=config)))


def _read_tensors(file: Path, device: torch.device, away: set[str]) -> dict[str, Tensor]:
    """The tensors of a file, each in memory of its own on a device; the weights `away` in the host's memory."""
    tensors = load_file(file)
    stay = {f"weights/{name}" for name in away}
    return {name: on_host(tensor, device) if name in stay else tensor.to(device) for name, tensor in tensors.items()}


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin with a prefix, which is removed."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def check_plans(plans: Mapping[int, Plan], variants: Sequence[Variant], num_steps: int) -> None:
    """Raise unless every plan keeps its budget and its length, and finds its programs and its history."""
    if not variants or not plans:
        raise ArtifactError("the manifest names no variant or no plan; compile again")
    for budget, plan in plans.items():
        written: set[int] = set()
        if plan.schedule.budget != budget or len(plan.steps) != num_steps:
            raise ArtifactError(f"the plan of budget {budget} is not one; compile again")
        for number, step in enumerate(plan.steps):
            written |= set() if step.slot is None else {step.slot}
            sound = (
                (step.slot is not None) == (number in plan.schedule.recompute_steps)
                and len(step.coefficients) == max(step.pattern)
                and all(map(math.isfinite, step.coefficients))
                and written >= set(range(max(step.pattern)))
                and all(_can_run(variant, step) for variant in variants)
            )
            if not sound:
                raise ArtifactError(f"the plan of budget {budget} makes no sense at step {number}; compile again")


def _can_run(variant: Variant, step: StepPlan) -> bool:
    """Whether a variant has the program of a step, with room for its coefficients."""
    program = variant.programs.get(step.program)
    return program is not None and len(step.coefficients) <= program.num_anchors


def _program(text: str, weights: dict[str, Tensor], device: torch.device, file: Path) -> Program:
    try:
        return program_from_json(text, weights, device)
    except ArtifactError as error:
        raise ArtifactError(f"{file}: {error}") from error


def program_file(number: int, name: str) -> str:
    """Where in an artifact a program of a variant lies."""
    return f"programs/{number}/{name}.json"
