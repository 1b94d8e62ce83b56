"""Which schedules a compilation gets: the default policy, and policies that first look at the model."""

import logging
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from recache_compile.compiler.compiled import Compiled, Engines
from recache_compile.config import CompileConfig
from recache_compile.errors import DispatchError, ModelError, ScheduleError
from recache_compile.ir.forecasters import Forecaster, check_forecaster, get_forecaster
from recache_compile.ir.schedule import Schedule, check_budgets
from recache_compile.models.registry import EMBEDDED
from recache_compile.pipelines.record import prompted
from recache_compile.pipelines.rollout import Batch, Rollouts
from recache_compile.policies.base import Calibration, Policy, Problem, make_schedules
from recache_compile.policies.calibration import merge_calibrations
from recache_compile.policies.recache import is_trained, read_policy
from recache_compile.policies.registry import CALIBRATED, get_policy
from recache_compile.policies.uniform import Uniform

log = logging.getLogger(__name__)

CALIBRATIONS = 4
"""Full generations that a calibration takes."""

FIRST_SEED = 1 << 40
"""Seed of the first of them, far from those that users choose."""

SHIPPED = {each.pipeline: each.policies for each in EMBEDDED.values()}
"""Policies that come with the package, by the class of the pipeline that they were trained for."""

AnyPolicy = str | Mapping[int, Sequence[int]] | Policy


@dataclass(frozen=True, slots=True)
class Choice:
    """A policy and what it is asked.

    Args:
        name: what an artifact calls the policy.
        policy: chooses schedules.
        budgets: numbers of recompute steps k.
        forecaster, order: fill the cached steps.
        num_steps: length T of the denoising loop.
        is_default: whether the user left the choice to us.
    """

    name: str
    policy: Policy
    budgets: tuple[int, ...]
    forecaster: str
    order: int
    num_steps: int
    is_default: bool = False

    @property
    def needs_calibration(self) -> bool:
        """Whether schedules or coefficients come from uncached generations of the model."""
        return self.forecaster == "fitted" or isinstance(self.policy, CALIBRATED)

    def answer(
        self, calibration: Calibration | None = None, levels: tuple[float, ...] = ()
    ) -> tuple[dict[int, Schedule], Forecaster]:
        """The schedules, and the forecaster that fills their cached steps.

        Args:
            calibration: of the model, where one is needed.
            levels: noise level of every step, where known.

        Raises:
            ScheduleError: the policy has no schedule for a budget, or needs more than it is given.
        """
        gram = None if calibration is None else calibration.gram
        forecaster = get_forecaster(self.forecaster, self.order, gram)
        problem = Problem(self.num_steps, forecaster, calibration, levels=levels)
        return make_schedules(self.policy, self.budgets, problem), forecaster


def choose_policy(
    policy: AnyPolicy,
    budgets: Collection[int | float],
    forecaster: str,
    order: int,
    config: CompileConfig,
    pipeline: str | None,
) -> Choice:
    """What a compilation will ask; all of it is checked here, and a policy is looked up once.

    Args:
        policy: name, trained policy, file, steps, mask or {budget: recompute steps}; "auto": one
            that was trained for this model and forecaster and ships with the package, else
            "gram"; "uniform" where there is no pipeline to look at.
        budgets: numbers of recompute steps k, or shares of all steps.
        forecaster, order: fill the cached steps.
        config: the other choices.
        pipeline: name of the pipeline's class; None for a module.

    Raises:
        ScheduleError: naming the choice that cannot be used.
    """
    checked = check_budgets(budgets, config.num_steps)
    check_forecaster(forecaster, order)
    named = policy
    if isinstance(policy, str) and policy == "auto":
        named = "uniform" if pipeline is None else default_policy(pipeline, forecaster, order, config, checked)
    choice = Choice(
        policy_name(named),
        get_policy(named, config.num_steps),
        checked,
        forecaster,
        order,
        config.num_steps,
        is_default=named is not policy and forecaster != "fitted",
    )
    if pipeline is None and choice.needs_calibration:
        raise ScheduleError(
            f"policy {choice.name}, forecaster {forecaster}: they need a few uncached generations; compile a pipeline"
            " without example_inputs, or choose others, such as uniform and taylor"
        )
    return choice


def default_policy(pipeline: str, forecaster: str, order: int, config: CompileConfig, budgets: Collection[int]) -> str:
    """What "auto" stands for: a trained policy that ships for this pipeline and forecaster, else "gram".

    Args:
        pipeline: name of its class.
        forecaster, order, config: must be those of the training.
        budgets: must be among those of the training.
    """
    folder = SHIPPED.get(pipeline, Path()) / f"{forecaster}-{order}"
    if pipeline not in SHIPPED or not is_trained(folder):
        return "gram"
    facts = {"num_steps": config.num_steps, "granularity": config.granularity.value}
    trained = read_policy(folder).facts
    is_same = all(trained.get(name) == value for name, value in facts.items())
    return str(folder) if is_same and {str(each) for each in budgets} <= set(trained["schedules"]) else "gram"


def policy_name(policy: AnyPolicy) -> str:
    """What the artifact calls a policy."""
    if not isinstance(policy, str):
        return "given"
    shipped = [folder for folder in SHIPPED.values() if Path(policy).parent == folder]
    return f"trained {Path(policy).name}" if shipped else policy


def plan_pipeline(
    engines: Engines,
    choice: Choice,
    pipeline: Any = None,
    calls: Sequence[Mapping[str, Any]] = (),
    calibration: Calibration | None = None,
) -> Compiled:
    """Ask a policy, after a look at the model where it needs one.

    Args:
        engines: that the plans are for.
        choice: what is asked.
        pipeline: whose transformer the engines are; only needed where the choice needs a calibration.
        calls: arguments of the pipeline calls that are looked at.
        calibration: what they have told before.

    Raises:
        RecacheError: the pipeline cannot be run, or the policy has no answer.
    """
    if choice.needs_calibration and calibration is None:
        try:
            calibration = calibrate_pipeline(pipeline, engines.on_this_device(), calls)
        except (DispatchError, ModelError) as error:
            if not choice.is_default:
                raise
            warnings.warn(f"schedules stay uniform, because the pipeline cannot be calibrated: {error}", stacklevel=3)
            choice = Choice(
                "uniform", Uniform(), choice.budgets, choice.forecaster, choice.order, choice.num_steps, True
            )
    log.info("choosing schedules")
    schedules, forecaster = choice.answer(calibration, engines.description.levels)
    return engines.with_plans(schedules, forecaster, choice.name, choice.policy, calibration)


def calibrate_pipeline(pipeline: Any, engines: Engines, calls: Sequence[Mapping[str, Any]]) -> Calibration:
    """Run every call once, uncached, on the engines.

    Args:
        pipeline: a `diffusers` pipeline; it is left as it is.
        engines: of its transformer.
        calls: arguments of the pipeline, all of the same kind.
    """
    found, seed = [], FIRST_SEED
    for number, call in enumerate(calls):
        log.info("calibrating, generation %d of %d", number + 1, len(calls))
        samples = _samples(call)
        prompt = call.get("prompt", "")
        prompts = tuple(prompt) if isinstance(prompt, (list, tuple)) else (prompt,)
        own = ("prompt", "latents", "generator")  # given noise would make all generations the same
        rest = {name: value for name, value in call.items() if name not in own}
        rollouts = Rollouts(pipeline, engines, rest)
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
