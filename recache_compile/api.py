"""The public functions: compile, accelerate, plan, inspect."""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from recache_compile.artifact.inspect import ArtifactFacts, facts_of
from recache_compile.artifact.store import look
from recache_compile.artifact.weightless import PlanFacts, plan_weightless
from recache_compile.compiler.build import build_engines
from recache_compile.compiler.compiled import Compiled, Engines
from recache_compile.compiler.examples import given_examples
from recache_compile.config import CompileConfig
from recache_compile.errors import ModelError
from recache_compile.ir.forecasters import Taylor, anchors_of, check_forecaster
from recache_compile.ir.schedule import budget_of
from recache_compile.pipelines.accelerate import Fallback, install, originals
from recache_compile.pipelines.engines import engines_of_pipeline
from recache_compile.pipelines.record import denoiser_of, denoisers_of, record_examples
from recache_compile.pipelines.schedule_cache import keep_schedules, key_of, known_calibration, known_schedule
from recache_compile.pipelines.varied import check_wishes
from recache_compile.pipelines.weightless import find_weightless
from recache_compile.runtimes.base import Runtime
from recache_compile.runtimes.registry import get_runtime
from recache_compile.search.default_policy import CALIBRATIONS, AnyPolicy, choose_policy, plan_pipeline

Calls = Mapping[str, Any] | Sequence[Mapping[str, Any]]


def compile(
    model: Any,
    example_inputs: Calls | None = None,
    *,
    budgets: Sequence[int | float] = (5, 10, 15),
    num_steps: int = 50,
    forecaster: str = "taylor",
    order: int = 1,
    policy: AnyPolicy = "auto",
    granularity: str = "stack",
    runtime: str | Runtime = "auto",
    roles: Mapping[str, str] | None = None,
    timesteps: Mapping[str, Tensor] | None = None,
    hoist: bool = True,
    residual: bool | None = None,
    call: Calls | None = None,
    others: Sequence[tuple[Any, Mapping[str, Any]]] = (),
    component: str = "transformer",
    calibrate: Sequence[Mapping[str, Any]] = (),
    cuda_graphs: bool = False,
    batching: bool = False,
    free: Sequence[str] = (),
    fixed_sizes: bool = False,
) -> Compiled:
    """Compile a diffusion transformer for fixed compute.

    Progress is told to the logger `recache_compile` at level INFO.

    Args:
        model: a module, or a `diffusers` pipeline, whose transformer is then compiled.
        example_inputs: arguments of one model call, or of several that differ in shape.
            None for a pipeline: it is run once while its calls are recorded, which also tells
            the timesteps.
        budgets: numbers of recompute steps k, or shares of all steps (0.2).  What is compiled serves
            others as well, where the policy has an answer for them.
        num_steps: length T of the denoising loop that the schedules are made for.  What is
            compiled serves loops of any length; see `compiler.planner`.
        forecaster: "reuse", "taylor", "hicache", "newton" or "fitted".
        order: the forecaster's polynomial order m.
        policy: name, trained policy, file, steps, mask or {budget: recompute steps}; see
            `get_policy`.  "auto": one that was trained for this model and forecaster and
            ships with the package, else "gram"; "uniform" for a module, with
            `example_inputs` and, with a warning, for pipelines that cannot be calibrated.
            Policies such as "gram", and the forecaster "fitted", run a few uncached generations
            of the pipeline.
        granularity: "output", "stack", "block" or "module": where features are cached.
        runtime: "eager", "inductor", "onnxruntime", "tensorrt", "tensorrt_rtx", or "auto": the
            first that can be used of inductor, onnxruntime and eager.  A `TensorRT` tells how
            engines are built.
        roles: "latents", "timestep" or "conditioning" of inputs by name, where their names do not tell.
        timesteps: per timestep input of the first example, its value at every step
            (num_steps, *shape).  Without them, the first generation learns them.
        hoist: move latents-independent work out of the steps.
        residual: cache what the stack (or each block) adds to its input instead of what it
            returns.  None: at "block" only.
        call: arguments of the pipeline call that is recorded, as `{"prompt": ...}`; several
            to compile for several sizes, batches or guidance settings.
        others: other pipelines with the same transformer (`from_pipe`), and the arguments of a
            call of each: they call it in kinds of their own, as ControlNet does, and share the engines.
        component: which of a pipeline's transformers is compiled ("transformer_2").
        calibrate: arguments of the pipeline calls that are looked at where the policy or the
            forecaster needs it; by default four times the first `call`, with other noise.
        cuda_graphs: replay CUDA graphs instead of calling engines, with eager, inductor and
            TensorRT on a GPU.
        batching: also build an engine for the recompute steps of several requests at once, which
            `Compiled.batcher` needs.
        free: "text", "size", "batch": engines of a pipeline serve any length of prompt, any size, any number
            of pictures.  What differs between several calls or `example_inputs` is free in any case, as far as
            the model's code and the runtime allow it; the log tells what is not.
        fixed_sizes: build engines for each size apart, which compiles longer; ONNX Runtime then computes no shapes.

    Raises:
        RecacheError: naming what cannot be done and the remedy.
    """
    check_forecaster(forecaster, order)
    calls = _calls(call)
    config = CompileConfig(
        num_steps=num_steps,
        anchors=anchors_of(forecaster, order),
        granularity=granularity,  # type: ignore[arg-type]  # made a `Granularity` there
        residual=residual,
        hoist=hoist,
        component=component,
        call=_recorded(calls[0]),
        roles=dict(roles or {}),
        cuda_graphs=cuda_graphs,
        batching=batching,
        free_sizes=not fixed_sizes,
    )
    check_wishes(free, config)
    is_pipeline = not isinstance(model, nn.Module)
    looked_at = type(model).__name__ if is_pipeline and example_inputs is None else None
    choice = choose_policy(policy, budgets, forecaster, order, config, looked_at)
    if not choice.needs_calibration:
        choice.answer()  # refused before anything takes long
    backend = get_runtime(runtime, _warn_caller, device=_device_of(model, component))
    if others and not looked_at:
        raise ModelError("others: pipelines are recorded where a pipeline is compiled without example_inputs")
    if free and not looked_at:
        raise ModelError("free: a pipeline tells what it is; give two example_inputs that differ in what is to be free")
    engines = _engines(model, example_inputs, timesteps or {}, calls, others, config, backend, free)
    return plan_pipeline(engines, choice, model, calibrate or [calls[0]] * CALIBRATIONS)


def _engines(
    model: Any,
    example_inputs: Calls | None,
    timesteps: Mapping[str, Tensor],
    calls: Sequence[Mapping[str, Any]],
    others: Sequence[tuple[Any, Mapping[str, Any]]],
    config: CompileConfig,
    runtime: Runtime,
    free: Sequence[str],
) -> Engines:
    """Engines of a module, or of a pipeline's transformer."""
    if example_inputs is None:
        if isinstance(model, nn.Module):
            raise ModelError(f"{type(model).__name__}: a module needs example_inputs, the arguments of one call")
        return engines_of_pipeline(model, config, calls, runtime, others, free)
    module = model if isinstance(model, nn.Module) else denoiser_of(model, config.component)
    return build_engines(module, given_examples(type(module).__name__, example_inputs, timesteps), config, runtime)


def _device_of(model: Any, component: str) -> torch.device | None:
    """Where the weights are, as far as that can be told."""
    module = model if isinstance(model, nn.Module) else getattr(model, component, None)
    weight = next(module.parameters(), None) if isinstance(module, nn.Module) else None
    return None if weight is None else weight.device


def _warn_caller(message: str) -> None:
    """Warn at the line that called the public function which asked `get_runtime`."""
    warnings.warn(message, stacklevel=5)


def _calls(call: Calls | None) -> list[Mapping[str, Any]]:
    """Several pipeline calls, at least one."""
    several: list[Any] = [{}] if call is None else [call] if isinstance(call, Mapping) else list(call)
    if not several or not all(isinstance(each, Mapping) for each in several):
        raise ModelError(
            f"call {call!r:.60}: expected the arguments of a pipeline call, as {{'prompt': ...}}, or several"
        )
    return several


def _recorded(call: Mapping[str, Any]) -> dict[str, Any]:
    """What an artifact keeps of a pipeline call: plain values beside the prompt."""
    plain = (bool, int, float, str, type(None))
    return {name: value for name, value in call.items() if isinstance(value, plain) and not name.startswith("prompt")}


def accelerate(
    pipeline: Any,
    compiled: Compiled | Mapping[str, Compiled] | None = None,
    budget: float | None = None,
    *,
    fallback: Fallback | None = None,
    num_steps: int | None = None,
    call: Calls | None = None,
    runtime: str | Runtime | None = None,
) -> Any:
    """Let a pipeline run on compiled engines, in place.

    Afterwards `pipeline(...)` works as before; `pipeline(..., budget=10)` changes the budget
    for one call, and `restore(pipeline)` gives it its own transformer back.  With `compiled`
    the pipeline's own transformer may be None: its weights are not needed.

    Args:
        pipeline: a `diffusers` pipeline.
        compiled: what `compile` or `load` returned for its transformer; a mapping from
            component to that where it has several ("transformer", "transformer_2").  None:
            it is compiled now, with what the cache on disk has of its programs and schedules.
        budget: number of recompute steps, or a share of all steps; by default the smallest compiled
            one, or 10.
        fallback: "eager" runs the original transformer, with a warning, where a call is not
            of a kind that was compiled; by default that is an error.
        num_steps, call, runtime: as of `compile`, where it is compiled now; without effect on what
            is compiled already, and refused then.

    Returns:
        The pipeline.

    Raises:
        DispatchError: there is no schedule for the budget.
        ModelError: the pipeline has no such component, or there is nothing to fall back to.
    """
    if not hasattr(type(pipeline), "components"):
        raise ModelError(f"accelerate: expected a pipeline of diffusers, got {pipeline!r:.60}; load it first")
    if compiled is None:
        num_steps = 50 if num_steps is None else num_steps
        budget = min(10, num_steps) if budget is None else budget
        place = _device_of(pipeline, "transformer")
        backend = get_runtime("auto" if runtime is None else runtime, _warn_caller, device=place)
        with originals(pipeline):
            compiled = {
                name: _compiled_now(pipeline, name, budget_of(budget, num_steps), num_steps, _calls(call), backend)
                for name in denoisers_of(pipeline)
            }
    else:
        asked = {"num_steps": num_steps, "call": call, "runtime": runtime}
        if given := [name for name, value in asked.items() if value is not None]:
            raise ModelError(f"accelerate: {', '.join(given)}: what is compiled already has its own; leave them out")
        parts = compiled.values() if isinstance(compiled, Mapping) else (compiled,)
        if wrong := [part for part in parts if not isinstance(part, Compiled)]:
            raise ModelError(f"accelerate: expected what rc.compile or rc.load returned, got {wrong[0]!r:.60}")
    return install(pipeline, compiled, budget, fallback)


def _compiled_now(
    pipeline: Any, component: str, budget: int, num_steps: int, calls: Sequence[Mapping[str, Any]], runtime: Runtime
) -> Compiled:
    """One transformer compiled with the usual choices; the disk may have its programs, and its schedule."""
    config = CompileConfig(num_steps=num_steps, component=component, call=_recorded(calls[0]))
    choice = choose_policy("auto", (budget,), "taylor", 1, config, type(pipeline).__name__)
    module = denoiser_of(pipeline, component)
    examples = [each for one in calls for each in record_examples(pipeline, num_steps, one, component)]
    engines = build_engines(module, examples, config, runtime)
    if not choice.needs_calibration:
        return plan_pipeline(engines, choice, pipeline, ())
    key = key_of(module, examples, config, runtime)
    calibration, schedule = known_calibration(key, num_steps), known_schedule(key, budget, num_steps)
    if calibration is not None and schedule is not None:
        return engines.with_plans({budget: schedule}, Taylor(1), choice.name, choice.policy, calibration)
    compiled = plan_pipeline(engines, choice, pipeline, [calls[0]] * CALIBRATIONS, calibration)
    if compiled.policy == choice.name:  # it was not done without
        keep_schedules(key, compiled)
    return compiled


def plan(
    model: str,
    *,
    budgets: Sequence[int | float] = (5, 10, 15),
    num_steps: int | None = None,
    forecaster: str = "taylor",
    order: int = 1,
    policy: AnyPolicy = "auto",
    granularity: str = "stack",
    residual: bool | None = None,
    hoist: bool = True,
    call: Mapping[str, Any] | None = None,
) -> PlanFacts:
    """What compiling a model would cost and save, without its weights.

    Args:
        model: name of a known model (such as "flux.1-dev"), a JSON file that describes one, or
            what `recache-compile` compiles: an embedded model, a folder or a Hub id.
        num_steps: length T of the denoising loop; None: the usual number of a known model, else 50.
        policy: as of `compile`; "auto" is uniform, as schedules of one budget cost the same.
        call: arguments of the pipeline.

    Others as those of `compile`.

    Raises:
        RecacheError: there is no such model, or it cannot be captured or split.
    """
    check_forecaster(forecaster, order)
    known = find_weightless(model, 50 if num_steps is None else num_steps, call or {})
    config = CompileConfig(
        num_steps=known.num_steps if num_steps is None else num_steps,
        anchors=anchors_of(forecaster, order),
        granularity=granularity,  # type: ignore[arg-type]  # made a `Granularity` there
        residual=residual,
        hoist=hoist,
        call=dict(call or {}),
    )
    choice = choose_policy(policy, budgets, forecaster, order, config, None)
    return plan_weightless(known, config, *choice.answer())


def inspect(compiled: Compiled | str | Path) -> ArtifactFacts:
    """What a compiled model, or an artifact on any machine, holds: programs, cache sites, schedules, costs.

    Args:
        compiled: what `compile` or `load` returned, or an artifact's folder or Hub id, which is
            read without its engines.

    Raises:
        ArtifactError: the folder is no artifact, or is damaged.
    """
    return facts_of(compiled if isinstance(compiled, Compiled) else look(compiled))
