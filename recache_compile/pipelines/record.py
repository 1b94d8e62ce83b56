"""Record how a `diffusers` pipeline calls its transformer, without running the transformer."""

import contextlib
import inspect
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from recache_compile.capture.check import check_modes, check_untouched
from recache_compile.capture.compat import progress_bar_of, uncompiled
from recache_compile.capture.processors import PROCESSORS
from recache_compile.capture.roles import usual_role
from recache_compile.compiler.examples import Example
from recache_compile.errors import ModelError, RecacheError, check_memory
from recache_compile.ir.signature import call_kind, named_leaves
from recache_compile.ir.value import Kind
from recache_compile.pipelines.call_recorder import recording
from recache_compile.pipelines.step_tracker import has_spare_timestep, remedy_for_length
from recache_compile.runtimes.dispatcher_tables import Timetable

DENOISER = "transformer"
"""Name of a pipeline's denoiser; it is in that of others as well: `transformer_2`, `unconditional_transformer`."""


def denoisers_of(pipeline: Any) -> dict[str, nn.Module]:
    """The pipeline's transformers by the name of their component."""
    names = [name for name in getattr(pipeline, "components", {}) if DENOISER in name] or [DENOISER]
    found = {name: getattr(pipeline, name, None) for name in names}
    plain = {name: uncompiled(module) for name, module in found.items()}
    return {name: module for name, module in plain.items() if isinstance(module, nn.Module)}


def denoiser_of(pipeline: Any, component: str) -> nn.Module:
    """One of the pipeline's transformers.

    Raises:
        ModelError: it has none of that name, or one that is compiled already or offloaded.
    """
    found = denoisers_of(pipeline)
    if component not in found:
        there = f"; it has {', '.join(found)}" if found else ""
        raise ModelError(f"{type(pipeline).__name__}: has no {component} to compile{there}")
    module, who = found[component], f"{type(pipeline).__name__}: its {component}"
    if not any(parameter.numel() for parameter in module.parameters()):
        raise ModelError(f"{who} has no weights; give it back the one it was made of")
    check_untouched(module, who)
    return module


def record_examples(pipeline: Any, num_steps: int, call: Mapping[str, Any], component: str = DENOISER) -> list[Example]:
    """Run a pipeline with recorders in place of its transformers and keep what one of them was called with.

    A transformer itself runs once for each kind of call, to learn the shape of its result;
    see `CallRecorder`.

    Args:
        pipeline: a `diffusers` pipeline.
        num_steps: length T of the denoising loop.
        call: arguments of the pipeline.
        component: the transformer whose calls are kept.

    Returns:
        One example for each distinct kind of call.  It knows the timesteps of all steps, if
        this transformer was called in all of them, and the role of inputs that change from
        step to step.

    Raises:
        ModelError: the pipeline cannot be called so, never called the transformer, or makes
            more steps than were asked for.
    """
    check_modes()
    denoiser_of(pipeline, component)
    arguments = _accepted(pipeline, {"num_inference_steps": num_steps, "output_type": "latent"}) | with_own_generators(
        call
    )
    if not any(name.startswith(("prompt", "class_labels")) for name in call):
        arguments |= _accepted(pipeline, {"prompt": ""})
    try:
        with contextlib.ExitStack() as stack:
            recorders = {
                name: stack.enter_context(recording(module)) for name, module in denoisers_of(pipeline).items()
            }
            stack.enter_context(_silent_progress(pipeline))
            stack.enter_context(torch.random.fork_rng())
            pipeline(**arguments)
    except RecacheError:
        raise
    except Exception as error:  # whatever the pipeline's own checks raise
        check_memory(error)
        raise ModelError(
            f"{type(pipeline).__name__}: recording a call with {sorted(arguments)} failed: {error}"
        ) from error
    if not recorders[component].calls:
        raise ModelError(f"{type(pipeline).__name__}: never called its {component}")
    check_length(getattr(pipeline, "scheduler", None), num_steps)
    check_one_step_a_call(recorders[component].calls, num_steps, type(pipeline).__name__)
    groups: dict[Any, list[dict[str, Any]]] = {}
    for inputs in recorders[component].calls:
        groups.setdefault(call_kind(named_leaves(inputs)), []).append(inputs)
    levels = _levels(getattr(pipeline, "scheduler", None), num_steps)
    made = (_example(group, num_steps, recorders[component].processors) for group in groups.values())
    return [replace(example, levels=levels) for example in made]


def _levels(scheduler: Any, num_steps: int) -> tuple[float, ...]:
    """Noise level of every step of a scheduler that has run; empty where it does not tell."""
    if getattr(scheduler, "timesteps", None) is None:
        return ()
    levels = Timetable.of(scheduler, num_steps).levels
    return levels if len(levels) == num_steps else ()


def with_own_generators(call: Mapping[str, Any]) -> dict[str, Any]:
    """The same arguments with generators in the same state, so that the caller's do not move on."""
    return pytree.tree_map_only(torch.Generator, _copied, dict(call))  # type: ignore[no-any-return]


def _copied(generator: torch.Generator) -> torch.Generator:
    copied = torch.Generator(generator.device)
    copied.set_state(generator.get_state())
    return copied


def check_scheduler(pipeline: Any) -> None:
    """Raise `ModelError` where a pipeline has no scheduler that could tell its step."""
    if getattr(pipeline, "scheduler", None) is None:
        raise ModelError(
            f"{type(pipeline).__name__}: has no scheduler that tells its step; compile its transformer alone, with"
            " example_inputs, and call compiled.dispatcher(budget)(step=i, ...) in a loop of your own"
        )


def check_length(scheduler: Any, num_steps: int) -> None:
    """Raise `ModelError` where a scheduler that has run made more steps of the number that it was asked for."""
    timesteps, asked = getattr(scheduler, "timesteps", None), getattr(scheduler, "num_inference_steps", None)
    if timesteps is None or asked is None or len(timesteps) <= num_steps:
        return
    if not (len(timesteps) == num_steps + 1 and has_spare_timestep(scheduler)):
        raise ModelError(remedy_for_length(scheduler, num_steps))


def check_one_step_a_call(calls: Sequence[Mapping[str, Any]], num_steps: int, who: str) -> None:
    """Raise `ModelError` where more than T different timesteps follow one another in one direction.

    In asynchronous diffusion forcing each frame has a step of its own, and a call no step at all.
    Calls at a timestep of zero, where nothing is left to denoise, are no steps.
    """
    every = (
        {name: leaf.double().mean() for name, leaf in named_leaves(call).items() if _is_timestep(name, leaf)}
        for call in calls
    )
    times = [each for each in every if not each or any(each.values())]
    longest, run, last = 0, 0, 0.0
    for before, now in itertools.pairwise(times):
        change = float(sum(now[name] - before[name] for name in now.keys() & before.keys()))
        if change:
            run = run + 1 if change * last > 0 else 1
            last, longest = change, max(longest, run)
    if longest >= num_steps:
        raise ModelError(
            f"{who}: makes {longest + 1} different steps in a loop of {num_steps}: its frames are at steps of their own"
            " (asynchronous diffusion forcing; call it with ar_step=0), or it has stages with timetables of their own"
        )


def _is_timestep(name: str, leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and usual_role(name) is Kind.TIMESTEP


def prompted(pipeline: Any, prompt: str | list[str], call: Mapping[str, Any], batch: int = 1) -> dict[str, Any]:
    """Arguments of a pipeline call with the prompt filled in, where the pipeline takes one and none is given."""
    arguments = dict(call)
    if not any(name.startswith("prompt") for name in call):
        several = [prompt] * batch if isinstance(prompt, str) and batch > 1 else prompt
        arguments |= _accepted(pipeline, {"prompt": several})
    return arguments


def _example(calls: list[dict[str, Any]], num_steps: int, processors: Mapping[str, Mapping[str, Any]]) -> Example:
    """What calls of one kind say about steps."""
    text = calls[0].get(PROCESSORS, "")
    calls = [{name: value for name, value in call.items() if name != PROCESSORS} for call in calls]
    firsts = _first_calls(calls, num_steps)
    steps = [named_leaves(inputs) for inputs in firsts]
    tensors = {name: leaf for name, leaf in named_leaves(calls[0]).items() if isinstance(leaf, Tensor)}
    columns = {name: [leaves[name] for leaves in steps] for name in tensors}
    roles = {
        name: Kind.TIMESTEP if tensor.dim() < 2 else Kind.LATENTS
        for name, tensor in tensors.items()
        if usual_role(name) is Kind.CONDITIONING and not all(torch.equal(tensor, other) for other in columns[name])
    }
    timely = [name for name in tensors if roles.get(name, usual_role(name)) is Kind.TIMESTEP]
    if len(steps) != num_steps:  # a part of the loop, or timesteps that are repeated
        timely = []
    second = next((at for at, inputs in enumerate(calls) if len(firsts) > 1 and inputs is firsts[1]), 1)
    timetable = {name: torch.stack(columns[name]) for name in timely}
    return Example(calls[0], timetable, roles, tuple(calls[1:second]), text, processors.get(text, {}))


def _first_calls(calls: list[dict[str, Any]], num_steps: int) -> list[dict[str, Any]]:
    """The first call of every step: a step begins where the timestep changes.

    Where no input is known to be a timestep, all steps must have equally many calls.
    """
    timesteps = [
        {name: leaf for name, leaf in named_leaves(inputs).items() if usual_role(name) is Kind.TIMESTEP}
        for inputs in calls
    ]
    if not timesteps[0]:
        per_step, rest = divmod(len(calls), num_steps)
        return [] if rest else calls[::per_step]
    begins = (
        any(not torch.equal(before[name], now[name]) for name in now) for before, now in itertools.pairwise(timesteps)
    )
    return [calls[0], *itertools.compress(calls[1:], begins)]


def _accepted(pipeline: Any, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Those arguments that the pipeline's call has a parameter for."""
    parameters = inspect.signature(type(pipeline).__call__).parameters
    is_modular = any(kind.__name__ == "ModularPipeline" for kind in type(pipeline).__mro__)  # takes what its blocks do
    is_open = is_modular or any(each.kind is each.VAR_KEYWORD for each in parameters.values())
    return {name: value for name, value in arguments.items() if name in parameters or is_open}


@contextlib.contextmanager
def _silent_progress(pipeline: Any) -> Iterator[None]:
    before = progress_bar_of(pipeline)
    pipeline.set_progress_bar_config(disable=True)
    try:
        yield
    finally:
        pipeline.set_progress_bar_config(**{**before, "disable": before.get("disable", False)})
