"""The public functions: compile a module or pipeline."""

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from recache_compile.compiler.build import Example, Options, compile_module, device_of, make_schedules
from recache_compile.compiler.compiled import Compiled, Description
from recache_compile.errors import DispatchError, ModelError, ScheduleError
from recache_compile.ir.forecasters import get_forecaster, uncalibrated
from recache_compile.ir.program import Granularity
from recache_compile.ir.value import Kind
from recache_compile.policies.base import Policy, Problem
from recache_compile.policies.registry import CALIBRATED, get_policy
from recache_compile.policies.uniform import Uniform
from recache_compile.runtimes._cuda_graphs import check_graphs
from recache_compile.runtimes.base import Runtime
from recache_compile.runtimes.registry import get_runtime
from recache_compile.search.default_policy import (
    CALIBRATIONS,
    calibrate_pipeline,
    default_policy,
    needs_calibration,
    policy_name,
    reschedule_calibrated,
)


def compile(
    model: Any,
    example_inputs: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
    budgets: Sequence[int] = (5, 10, 15),
    num_steps: int = 50,
    forecaster: str = "taylor",
    order: int = 1,
    policy: str | Mapping[int, Sequence[int]] | Policy = "uniform",
    granularity: str = "stack",
    runtime: str | Runtime = "auto",
    *,
    roles: Mapping[str, Kind | str] | None = None,
    timesteps: Mapping[str, Tensor] | None = None,
    hoist: bool = True,
    residual: bool | None = None,
    call: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
    component: str = "transformer",
    calibrate: Sequence[Mapping[str, Any]] = (),
    cuda_graphs: bool = False,
    report: Callable[[str], None] = lambda stage: None,
) -> Compiled:
    """Compile a diffusion transformer for fixed compute.

    Args:
        model: a module, or a `diffusers` pipeline, whose transformer is then compiled.
        example_inputs: arguments of one model call, or of several that differ in shape.
            None for a pipeline: it is run once with a recording stand-in, which also tells
            the timesteps.
        budgets: numbers of recompute steps k.
        num_steps: length T of the denoising loop.
        forecaster: "reuse", "taylor", "hicache", "newton" or "fitted".
        order: the forecaster's polynomial order m.
        policy: name, trained policy, file, steps, mask or {budget: recompute steps}; see
            `get_policy`.  "auto": one that was trained for this model and forecaster and
            ships with the package, else "gram"; "uniform" for a module, with
            `example_inputs` and, with a warning, for pipelines that cannot be calibrated.
            Policies such as "gram", and the forecaster "fitted", run a few full generations
            of the pipeline.
        granularity: "output", "stack", "block" or "module": where features are cached.
        runtime: "eager", "inductor", "onnxruntime", "tensorrt", "tensorrt_rtx", or "auto": the
            first that can be used of inductor, onnxruntime and eager.  A `TensorRT` tells how
            engines are built.
        roles: role of inputs by name, where their names do not tell.
        timesteps: per timestep input of the first example, its value at every step
            (num_steps, *shape).  Without them, the first generation learns them.
        hoist: move latents-independent work out of the steps.
        residual: cache what the stack (or each block) adds to its input instead of what it
            returns.  None: at "block" only.
        call: arguments of the pipeline call that is recorded, as `{"prompt": ...}`; several
            to compile for several sizes, batches or guidance settings.
        component: which of a pipeline's transformers is compiled ("transformer_2").
        calibrate: arguments of the pipeline calls that are looked at where the policy or the
            forecaster needs it; by default four times the first `call`, with other noise.
        cuda_graphs: replay CUDA graphs instead of calling engines, with eager, inductor and
            TensorRT on a GPU.
        report: told the name of each stage as it begins.

    Raises:
        RecacheError: naming what cannot be done and the remedy.
    """
    may_stay_uniform = policy == "auto" and forecaster != "fitted"
    if policy == "auto":
        can_look = not isinstance(model, nn.Module) and example_inputs is None
        name = type(model).__name__
        trained = default_policy(name, forecaster, order, num_steps, granularity, budgets)
        policy = trained if can_look else "uniform"
    chosen = get_policy(policy, num_steps)
    options = compile_options(budgets, num_steps, forecaster, order, chosen, granularity, hoist, residual, roles)
    looks = needs_calibration(chosen, forecaster, num_steps)
    if looks and (isinstance(model, nn.Module) or example_inputs is not None):
        raise ScheduleError(
            f"policy {policy}, forecaster {forecaster}: they need a few full generations; compile a pipeline without"
            " example_inputs, or choose others, such as uniform and taylor"
        )
    backend = get_runtime(runtime, explain=lambda message: warnings.warn(message, stacklevel=3))
    module, examples = _examples(model, example_inputs, timesteps or {}, num_steps, call, component)
    if cuda_graphs:
        check_graphs(backend, device_of(examples[0].inputs))
    description = Description(
        model=type(module).__name__,
        model_class=f"{type(module).__module__}.{type(module).__qualname__}",
        config=json.loads(json.dumps(dict(getattr(module, "config", {})), default=str)),
        num_steps=num_steps,
        forecaster=options.forecaster.name,
        order=options.forecaster.order,
        policy=policy_name(policy),
        granularity=granularity,
        residual=residual,
        runtime=backend.name,
        hoist=hoist,
        component=component,
        cuda_graphs=cuda_graphs,
    )
    compiled = compile_module(module, examples, options, backend, description, report)
    if not looks:
        return compiled
    first = call[0] if isinstance(call, Sequence) else call or {}
    calls = calibrate or [first] * CALIBRATIONS
    return _calibrated(compiled, model, calls, chosen, forecaster, may_stay_uniform, report)


def _calibrated(
    compiled: Compiled,
    pipeline: Any,
    calls: Sequence[Mapping[str, Any]],
    policy: Policy,
    forecaster: str,
    may_stay_uniform: bool,
    report: Callable[[str], None],
) -> Compiled:
    """The same engines under schedules that a few full generations tell."""
    try:
        calibration = calibrate_pipeline(pipeline, compiled.on_this_device(), calls, report)
    except (DispatchError, ModelError) as error:
        if not may_stay_uniform:
            raise
        warnings.warn(f"schedules stay uniform, because the pipeline cannot be calibrated: {error}", stacklevel=3)
        return replace(compiled, description=replace(compiled.description, policy="uniform"))
    return reschedule_calibrated(compiled, calibration, policy, forecaster, report)


def compile_options(
    budgets: Sequence[int],
    num_steps: int,
    forecaster: str,
    order: int,
    policy: str | Mapping[int, Sequence[int]] | Policy,
    granularity: str,
    hoist: bool,
    residual: bool | None = None,
    roles: Mapping[str, Kind | str] | None = None,
) -> Options:
    """The choices of `compile`, checked before anything is loaded; arguments as there.

    What a calibration will tell is filled in for now: uniform schedules, and `taylor` for
    `fitted`, whose programs are the same.

    Raises:
        ScheduleError: naming the choice that cannot be used.
    """
    chosen = get_policy(policy, num_steps)
    filler = get_forecaster(uncalibrated(forecaster), order)
    for_now = Uniform() if isinstance(chosen, CALIBRATED) else chosen
    return Options(
        schedules=make_schedules(for_now, budgets, Problem(num_steps, filler)),
        forecaster=filler,
        granularity=_granularity(granularity),
        residual=residual,
        hoist=hoist,
        roles=roles or {},
    )


def _granularity(name: str) -> Granularity:
    try:
        return Granularity(name)
    except ValueError:
        known = ", ".join(granularity.value for granularity in Granularity)
        raise ScheduleError(f"granularity {name!r} is unknown; choose {known}") from None


def _examples(
    model: Any,
    example_inputs: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None,
    timesteps: Mapping[str, Tensor],
    num_steps: int,
    call: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None,
    component: str,
) -> tuple[nn.Module, list[Example]]:
    if not isinstance(model, nn.Module):
        from recache_compile.pipelines.record import denoiser_of, record_examples

        module = denoiser_of(model, component)
        if example_inputs is None:
            calls = [call or {}] if call is None or isinstance(call, Mapping) else call
            return module, [each for one in calls for each in record_examples(model, num_steps, one, component)]
    else:
        module = model
    if example_inputs is None:
        raise ModelError(f"{type(module).__name__}: a module needs example_inputs, the arguments of one call")
    each = [example_inputs] if isinstance(example_inputs, Mapping) else example_inputs
    if not each:
        raise ModelError(f"{type(module).__name__}: example_inputs is empty; give the arguments of at least one call")
    return module, [Example(inputs, timesteps if number == 0 else {}, {}) for number, inputs in enumerate(each)]
