"""`recache-compile evaluate`, read from top to bottom: engines, schedules, times, samples, estimates."""

import contextlib
import datetime
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch

from recache_compile.artifact.store import load, load_own
from recache_compile.compiler.compiled import Compiled, Engines
from recache_compile.evaluation.estimates import Reference, estimates, features_in
from recache_compile.evaluation.metrics import features_of_folder, features_of_reference
from recache_compile.evaluation.profile import PROFILE, Profile, call_of, measure_redundancy, measure_times
from recache_compile.evaluation.request import BUDGETS, POLICIES, EvaluationRequest
from recache_compile.evaluation.result import EvaluationResult, facts_about, write_result
from recache_compile.evaluation.runner import SampleRunner, Values, missing_of, read_values
from recache_compile.evaluation.setting import EVALUATION, FIRST_OF_REFERENCE, Setting, begin, check_begun
from recache_compile.ir.forecasters import get_forecaster
from recache_compile.ir.schedule import Schedule
from recache_compile.models.registry import find
from recache_compile.pipelines.engines import engines_of_pipeline
from recache_compile.pipelines.load import load_pipeline
from recache_compile.pipelines.prompts import captions_for
from recache_compile.pipelines.rollout import Batch, Rollouts
from recache_compile.policies.base import Calibration, Problem, make_schedules
from recache_compile.policies.calibration import load_calibration, merge_calibrations, save_calibration
from recache_compile.policies.registry import CALIBRATED, get_policy
from recache_compile.search.default_policy import CALIBRATIONS, FIRST_SEED, default_policy, policy_name
from recache_compile.search.ray_pool import RayPool, import_ray
from recache_compile.support.files import check_place, output_errors
from recache_compile.support.machine import machine, versions
from recache_compile.support.records import read_record, write_record

log = logging.getLogger(__name__)


def evaluate(
    request: EvaluationRequest,
    folder: Path,
    command: str = "",
    count: Callable[[int, int], None] = lambda done, asked: None,
) -> EvaluationResult:
    """Judge every policy at every budget against the uncached results of the same noise.

    Stopped at any time, the same call goes on where it was: batches that are judged are not drawn again.

    Args:
        request: what is evaluated.
        folder: where everything is kept; see `setting`.
        command: how a user asks for the same, for the result.
        count: told how many batches of those asked for are judged.

    Raises:
        RecacheError: naming what cannot be done.
    """
    if request.workers:
        import_ray()  # before anything takes long
    setting = request.setting()
    with output_errors(folder, "folder"):
        check_begun(setting, folder)
        check_place(folder / EVALUATION)
    pipeline = _with_weights(setting)
    compiled = _engines(setting, folder, pipeline)
    schedules = _schedules(request, setting, folder, pipeline, compiled)
    masks = {schedule.mask for each in schedules.values() for schedule in each.values()}
    setting = replace(setting, masks=tuple(sorted(masks)))
    begin(setting, folder)
    by_budget = {budget: schedule for each in reversed(schedules.values()) for budget, schedule in each.items()}
    rescheduled = compiled.engines.with_plans(
        by_budget | {setting.num_steps: Schedule.every(setting.num_steps)}, compiled.forecaster
    )
    times = _profile(setting, folder, pipeline, rescheduled, request.repeats)
    setattr(pipeline, setting.config.component, None)  # the engines have the weights
    judged, reference = _judged(request, setting, folder, lambda: SampleRunner(folder, pipeline, compiled), count)
    log.info("estimating")
    uncached, lines = estimates(setting, schedules, judged, reference, compiled, times)
    result = EvaluationResult(
        model=setting.model,
        num_steps=setting.num_steps,
        forecaster=setting.forecaster,
        order=setting.order,
        granularity=setting.config.granularity.value,
        runtime=setting.config.runtime,
        dtype=setting.config.dtype,
        device=setting.config.device,
        batch_size=setting.batch_size,
        seed=setting.seed,
        samples=len(judged) * setting.batch_size,
        reference="" if reference is None else reference.name,
        uncached=uncached,
        uncached_seconds=(times.original.total, times.budgets[setting.num_steps].total),
        lines=lines,
        facts=facts_about(compiled),
        machine=machine(setting.config.device),
        date=datetime.date.today().isoformat(),
        command=command,
        versions=versions(),
    )
    write_result(result, folder)
    return result


def _with_weights(setting: Setting) -> Any:
    """The pipeline with its transformer."""
    log.info("loading %s", setting.model)
    return load_pipeline(setting.model, getattr(torch, setting.config.dtype), torch.device(setting.config.device))


def _engines(setting: Setting, folder: Path, pipeline: Any) -> Compiled:
    """The engines and the forecaster, compiled for the setting's batch size unless they are there.

    A model that cannot be compiled leaves nothing behind.
    """
    place = setting.engines(folder)
    if not place.exists():
        engines = engines_of_pipeline(pipeline, setting.config, [call_of(setting, pipeline)])
        begin(setting, folder)
        gram = _calibration(setting, folder, pipeline, engines).gram if setting.forecaster == "fitted" else None
        forecaster = get_forecaster(setting.forecaster, setting.order, gram)
        every = {setting.num_steps: Schedule.every(setting.num_steps)}
        engines.with_plans(every, forecaster, "uncached").save(place)
    log.info("loading the engines")
    return load(place, device=setting.config.device) if setting.artifact else load_own(place, setting.config.device)


def _schedules(
    request: EvaluationRequest, setting: Setting, folder: Path, pipeline: Any, compiled: Compiled
) -> dict[str, dict[int, Schedule]]:
    """What every policy chooses for every budget; an artifact's own schedules come first."""
    own = compiled.schedules if setting.artifact else {}
    budgets = request.budgets or tuple(own) or BUDGETS
    found: dict[str, dict[int, Schedule]] = {}
    if common := {budget: own[budget] for budget in budgets if budget in own}:
        found["as compiled"] = common
    wanted = request.policies or (() if len(common) == len(budgets) else POLICIES)
    calibration: Calibration | None = None
    for name in wanted:
        kind = type(pipeline).__name__, setting.forecaster, setting.order, setting.config
        choice = default_policy(*kind, budgets) if name == "auto" else name
        policy = get_policy(choice, setting.num_steps)
        if isinstance(policy, CALIBRATED) and calibration is None:
            calibration = _calibration(setting, folder, pipeline, compiled.engines)
        levels = compiled.description.levels
        problem = Problem(setting.num_steps, compiled.forecaster, calibration, levels=levels)
        found[policy_name(choice)] = make_schedules(policy, budgets, problem)
    return found


def _calibration(setting: Setting, folder: Path, pipeline: Any, engines: Engines) -> Calibration:
    """What policies look at, as `compile` does: other captions and noise than those that are judged.

    Kept, so that policies choose the same when an evaluation goes on.
    """
    file = folder / "calibration.safetensors"
    if not file.exists():
        log.info("calibrating")
        rollouts, size = Rollouts(pipeline, engines, setting.config.call), setting.batch_size
        captions = tuple(islice(cycle(captions_for(pipeline)), max(size, CALIBRATIONS)))
        batches = [
            Batch(captions[first : first + size], tuple(range(FIRST_SEED + first, FIRST_SEED + first + size)))
            for first in range(0, len(captions) - size + 1, size)
        ]
        save_calibration(merge_calibrations([rollouts.calibrate(batch) for batch in batches]), file)
    return load_calibration(file)


def _profile(setting: Setting, folder: Path, pipeline: Any, compiled: Compiled, repeats: int) -> Profile:
    """Where the time goes; not measured twice for the same budgets on the same machine."""
    file = folder / PROFILE
    known = read_record(file, Profile, "remove it, it is then made anew") if file.exists() else None
    same = known and (known.machine, known.versions, known.repeats) == (
        machine(setting.config.device),
        versions(),
        repeats,
    )
    if known is None or not same or not set(known.budgets) >= set(compiled.plans):
        redundancy = known.redundancy if known else None
        known = replace(measure_times(setting, pipeline, compiled, repeats), redundancy=redundancy)
        write_record(known, file)
    if known.redundancy is None:
        known = replace(known, redundancy=measure_redundancy(setting, pipeline))
        write_record(known, file)
    return known


def _judged(
    request: EvaluationRequest,
    setting: Setting,
    folder: Path,
    runner: Callable[[], SampleRunner],
    count: Callable[[int, int], None],
) -> tuple[list[Values], Reference | None]:
    """The values of all batches, and the reference set where a metric is about sets."""
    numbers = tuple(range(-(-request.samples // setting.batch_size)))
    by_sets, embedded = "fid" in setting.metrics, find(setting.model)
    alone = by_sets and request.reference is None and embedded is None
    others = tuple(FIRST_OF_REFERENCE + number for number in numbers) if alone else ()
    left = [number for number in (*numbers, *others) if missing_of(setting, number, read_values(folder, number))]
    log.info("drawing and judging")
    count(0, len(left))
    with _one_thread():
        for done, _ in enumerate(_run(request, folder, runner, left), start=1):
            count(done, len(left))
    judged: list[Values] = [read_values(folder, number) for number in numbers]
    if not by_sets:
        return judged, None
    log.info("looking at the reference set")
    if request.reference is not None:
        features = features_of_folder(request.reference, setting.model)
        return judged, Reference(f"the pictures in {request.reference}", features, True)
    if embedded is not None:
        return judged, Reference(embedded.reference, features_of_reference(embedded, setting.prompts), True)
    features = features_in([read_values(folder, number) for number in others], setting.uncached)
    return judged, Reference("uncached samples of other noise", features, False)


def _run(
    request: EvaluationRequest, folder: Path, runner: Callable[[], SampleRunner], numbers: Sequence[int]
) -> Iterator[int]:
    """Draw and judge batches, here or on workers."""
    if not numbers:
        return
    if not request.workers:
        yield from runner().run(numbers)
        return
    with RayPool(folder, request.workers, request.ray_address, SampleRunner) as pool:
        yield from pool.work((number,) for number in numbers)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Sums of several threads add up in another order, and any number of workers shall find the same."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
