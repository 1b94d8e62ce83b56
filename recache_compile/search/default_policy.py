"""Schedules for a compiled pipeline: the default policy, and those that first look at the model."""

from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from recache_compile.compiler.build import make_schedules
from recache_compile.compiler.compiled import Compiled
from recache_compile.ir.forecasters import get_forecaster
from recache_compile.models.registry import EMBEDDED
from recache_compile.pipelines.record import prompted
from recache_compile.pipelines.rollout import Batch, Rollouts
from recache_compile.policies.base import Calibration, Policy, Problem
from recache_compile.policies.calibration import merge_calibrations
from recache_compile.policies.recache import is_trained, read_policy
from recache_compile.policies.registry import CALIBRATED, get_policy

CALIBRATIONS = 4
"""Full generations that a calibration takes."""

FIRST_SEED = 1 << 40
"""Seed of the first of them, far from those that users choose."""

SHIPPED = {each.pipeline: each.policies for each in EMBEDDED.values()}
"""Policies that come with the package, by the class of the pipeline that they were trained for."""

AnyPolicy = str | Mapping[int, Sequence[int]] | Policy


def default_policy(
    pipeline: str, forecaster: str, order: int, num_steps: int, granularity: str, budgets: Collection[int]
) -> str:
    """What "auto" stands for: a trained policy that ships for this pipeline and forecaster, else "gram".

    Args:
        pipeline: name of its class.
        forecaster, order, num_steps, granularity: must be those of the training.
        budgets: must be among those of the training.
    """
    folder = SHIPPED.get(pipeline, Path()) / f"{forecaster}-{order}"
    if pipeline not in SHIPPED or not is_trained(folder):
        return "gram"
    facts = {"num_steps": num_steps, "granularity": granularity}
    trained = read_policy(folder).facts
    fits = all(trained.get(name) == value for name, value in facts.items())
    return str(folder) if fits and {str(each) for each in budgets} <= set(trained["schedules"]) else "gram"


def policy_name(policy: AnyPolicy) -> str:
    """What the artifact calls a policy."""
    if not isinstance(policy, str):
        return "given"
    shipped = [folder for folder in SHIPPED.values() if Path(policy).parent == folder]
    return f"trained {Path(policy).name}" if shipped else policy


def needs_calibration(policy: AnyPolicy, forecaster: str, num_steps: int) -> bool:
    """Whether schedules or coefficients come from full generations of the model."""
    return forecaster == "fitted" or isinstance(get_policy(policy, num_steps), CALIBRATED)


def calibrate_pipeline(
    pipeline: Any,
    compiled: Compiled,
    calls: Sequence[Mapping[str, Any]],
    report: Callable[[str], None] = lambda stage: None,
) -> Calibration:
    """Run every call once, uncached, on the engines.

    Args:
        pipeline: a `diffusers` pipeline; it is left as it is.
        compiled: for its transformer.
        calls: arguments of the pipeline, all of the same kind.
        report: told what begins.
    """
    found, seed = [], FIRST_SEED
    for number, call in enumerate(calls):
        report(f"calibrating, generation {number + 1} of {len(calls)}")
        samples = _samples(call)
        prompt = call.get("prompt", "")
        prompts = tuple(prompt) if isinstance(prompt, (list, tuple)) else (prompt,)
        rest = {name: value for name, value in call.items() if name != "prompt"}
        rollouts = Rollouts(pipeline, compiled, rest)
        found.append(rollouts.calibrate(Batch(prompts, tuple(range(seed, seed + samples)))))
        seed += samples
    return merge_calibrations(found)


def calibration_calls(
    pipeline: Any, captions: Sequence[str], call: Mapping[str, Any], batch: int = 1
) -> list[dict[str, Any]]:
    """Arguments of the pipeline calls of a calibration, the captions taken in turn."""
    return [prompted(pipeline, caption, call, batch) for caption in islice(cycle(captions), CALIBRATIONS)]


def _samples(call: Mapping[str, Any]) -> int:
    """How many results a pipeline call asks for."""
    several = [call[name] for name in ("prompt", "prompt_embeds", "class_labels") if call.get(name) is not None]
    samples = len(several[0]) if several and not isinstance(several[0], str) else 1
    return samples * int(call.get("num_images_per_prompt", 1)) * int(call.get("num_videos_per_prompt", 1))


def reschedule_calibrated(
    compiled: Compiled, calibration: Calibration, policy: Policy, forecaster: str, report: Callable[[str], None]
) -> Compiled:
    """The same engines under the schedules of a policy, and with a forecaster, that a calibration tells.

    Args:
        compiled: with the budgets and the order that are wanted.
        calibration: of the model.
        policy: chooses them.
        forecaster: its name.
        report: told what begins.

    Raises:
        ScheduleError: the policy needs more than a calibration.
    """
    facts = compiled.description
    report("choosing schedules")
    chosen = get_forecaster(forecaster, facts.order, calibration.gram)
    problem = Problem(facts.num_steps, chosen, calibration)
    schedules = make_schedules(policy, compiled.plans, problem)
    return compiled.reschedule(schedules, chosen)
