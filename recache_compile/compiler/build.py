"""The compiler: from a model to engines and plans.  `compile_module` reads as the design's picture."""

import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from recache_compile.capture.adapters import fused_adapters
from recache_compile.capture.capture import Captured, capture
from recache_compile.compiler.compiled import Compiled, Description
from recache_compile.compiler.split import annotate, cache_points, describe_sites, specialise
from recache_compile.config import CompileConfig
from recache_compile.errors import CaptureError, ScheduleError
from recache_compile.ir.cost import count_macs
from recache_compile.ir.forecasters import Forecaster
from recache_compile.ir.plan import make_plan
from recache_compile.ir.program import Granularity, Program, dtype_name
from recache_compile.ir.schedule import Schedule, check_budgets
from recache_compile.ir.signature import named_leaves
from recache_compile.ir.value import Kind
from recache_compile.policies.base import Policy, Problem
from recache_compile.runtimes.base import Engine, Runtime, Variant, lower

Report = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Example:
    """One call of the model, at the shapes to compile for.

    Args:
        inputs: arguments of the call.
        timesteps: per timestep input, its value at every step (num_steps, *shape); empty
            when unknown, and then learned at run time.
        roles: of inputs whose behaviour, not their name, tells it.
        others: calls of the same shapes with other values, for models that decide by values.
    """

    inputs: Mapping[str, Any]
    timesteps: Mapping[str, Tensor]
    roles: Mapping[str, Kind]
    others: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True, slots=True)
class Options:
    """What to compile; see `recache_compile.compile`."""

    schedules: Mapping[int, Schedule]
    forecaster: Forecaster
    granularity: Granularity
    residual: bool | None
    hoist: bool
    roles: Mapping[str, Kind | str]

    @property
    def config(self) -> CompileConfig:
        """What engines are built for."""
        budgets = [schedule.budget for schedule in self.schedules.values()]
        held = min(self.forecaster.order + 1, max((each for each in budgets if each < self.num_steps), default=1))
        return CompileConfig(self.num_steps, held, self.granularity, self.residual, self.hoist)

    @property
    def num_steps(self) -> int:
        """Length T of the denoising loop."""
        return next(iter(self.schedules.values())).num_steps


def compile_module(
    module: nn.Module,
    examples: Sequence[Example],
    options: Options,
    runtime: Runtime,
    description: Description,
    report: Report,
) -> Compiled:
    """Capture, annotate, plan, specialise (and hoist, and verify), lower."""
    keep = tempfile.TemporaryDirectory(prefix="recache-")
    with fused_adapters(module):
        captures = [
            each
            for number, example in enumerate(distinct(examples))
            for each in capture_example(module, example, options, number, report)
        ]
        names = tuple(module.state_dict())
    check_same_call(captured for _, captured in captures)
    annotated = [annotate(captured, options.config) for _, captured in captures]
    sites = check_same_sites(annotated)
    report(describe_sites(annotated[0]))
    weights: dict[str, Tensor] = {}
    variants: list[Variant] = []

    def lowered(program: Program, number: int, device: torch.device) -> Engine:
        report(f"lowering {program.name} to {runtime.name}")
        return lower(program, runtime, weights, device, Path(keep.name), number)

    for number, ((example, captured), program) in enumerate(zip(captures, annotated, strict=True)):
        device = device_of(example.inputs)
        timesteps = check_timesteps(example.timesteps, captured.program, options, device)
        programs = specialise(program, options.config)
        weights |= {name: weight for each in programs.values() for name, weight in each.weights.items()}
        variants.append(
            Variant(
                inputs=captured.program.inputs,
                constants=captured.constants,
                fixed=captured.fixed,
                device=device,
                programs=programs,
                engines={name: lowered(each, number, device) for name, each in programs.items()},
                timesteps=timesteps,
                macs=count_macs(captured.program, device),
            )
        )
    plans = {budget: make_plan(each, options.forecaster, sites) for budget, each in options.schedules.items()}
    latents = next(value for value in variants[0].inputs if value.kind is Kind.LATENTS)
    description = replace(
        description,
        dtype=dtype_name(latents.dtype),
        weights=names,
    )
    signature, folder, key = captures[0][1].signature, Path(keep.name), runtime.build_requirements(variants[0].device)
    return Compiled(description, signature, plans, tuple(variants), weights, folder, key, keep)


def capture_example(
    module: nn.Module, example: Example, options: Options, number: int, report: Report
) -> list[tuple[Example, Captured]]:
    """Capture the module once, and once more for each call with other values of inputs that became constants.

    Args:
        module: the original.
        example: one kind of call.
        options: for the roles.
        number: of the example; tells the constants of several apart.
        report: told what begins.
    """
    captures: list[tuple[Example, Captured]] = []
    for inputs in (example.inputs, *example.others):
        leaves = named_leaves(inputs)
        known = [captured.fixed for _, captured in captures]
        if any(all(torch.equal(leaves[name], value) for name, value in fixed.items()) for fixed in known):
            continue
        report("capturing")
        label = f"{number}_{len(captures)}" if captures else str(number)
        captures.append((example, capture(module, inputs, {**example.roles, **options.roles}, label)))
    return captures


def check_same_call(captures: Iterable[Captured]) -> None:
    """Raise unless the model returns the same structure for all examples."""
    if len({captured.signature for captured in captures}) > 1:
        raise CaptureError(
            "examples: the model returns another structure for one of them than for the first; compile apart"
        )


def distinct(examples: Iterable[Example]) -> list[Example]:
    """One example for each kind of call: those of the same shapes and constants are others of the first."""
    kinds: dict[Any, Example] = {}
    for example in examples:
        leaves = named_leaves(example.inputs)
        facts = {
            name: (leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) else repr(leaf) for name, leaf in leaves.items()
        }
        kind = frozenset(facts.items())
        first = kinds.setdefault(kind, example)
        if first is not example:
            kinds[kind] = replace(first, others=(*first.others, example.inputs, *example.others))
    return list(kinds.values())


def check_same_sites(annotated: Sequence[Program]) -> int:
    """The number of cache sites, which the plans of all examples share."""
    first, *others = (len(cache_points(program)) for program in annotated)
    for found in others:
        if found != first:
            raise CaptureError(f"examples: one has {found} cache sites, the first has {first}; compile apart")
    return first


def check_timesteps(
    timesteps: Mapping[str, Tensor], captured: Program, options: Options, device: torch.device
) -> dict[str, Tensor]:
    """The timetable in the inputs' dtype and place, once its names and shapes are known to fit."""
    inputs = {value.name: value for value in captured.inputs if value.kind is Kind.TIMESTEP}
    checked = {}
    for name, column in timesteps.items():
        if name not in inputs:
            raise CaptureError(f"timesteps: {name!r} is no timestep input; these are: {', '.join(inputs) or 'none'}")
        expected = (options.num_steps, *inputs[name].shape)
        if tuple(column.shape) != expected:
            raise CaptureError(
                f"timesteps {name!r}: shape {tuple(column.shape)}, expected (num_steps, *shape) = {expected}"
            )
        checked[name] = column.to(device, inputs[name].dtype)
    return checked


def device_of(inputs: Mapping[str, Any]) -> torch.device:
    """Where the example inputs are."""
    return next(leaf.device for leaf in named_leaves(inputs).values() if isinstance(leaf, Tensor))


def make_schedules(policy: Policy, budgets: Iterable[int], problem: Problem) -> dict[int, Schedule]:
    """One schedule a budget, each checked to cost exactly what was asked.

    Raises:
        ScheduleError: a budget is not usable, or the policy broke its promise.
    """
    schedules = {}
    for budget in check_budgets(budgets, problem.num_steps):
        schedule = policy.schedule(problem, budget)
        if schedule.budget != budget or schedule.num_steps != problem.num_steps:
            raise ScheduleError(f"policy {policy}: gave {schedule} for budget {budget} and {problem.num_steps} steps")
        schedules[budget] = schedule
    return schedules
