"""Compile a model, write the artifact, and show what every budget gives beside the uncached pipeline."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from recache_compile.artifact.store import check_writable
from recache_compile.compiler.compiled import Compiled
from recache_compile.config import CompileConfig
from recache_compile.errors import ArtifactError, ModelError
from recache_compile.evaluation.measure import Measured, compare, unmeasured
from recache_compile.evaluation.picture import save_comparison
from recache_compile.ir.schedule import check_budgets
from recache_compile.ir.signature import call_kind, named_leaves
from recache_compile.pipelines.engines import engines_of_pipeline
from recache_compile.pipelines.load import absolute, load_pipeline
from recache_compile.pipelines.prompts import captions_for
from recache_compile.pipelines.record import prompted, record_examples
from recache_compile.runtimes.base import Runtime
from recache_compile.search.default_policy import AnyPolicy, calibration_calls, choose_policy, plan_pipeline
from recache_compile.support.files import check_file

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class CompileRequest:
    """What a user asks of `recache-compile MODEL`.

    Args:
        model: name, folder or Hub id of the pipeline.
        config: what engines are built with; `call` holds further arguments of the pipeline.
        budgets: numbers of recompute steps k, or shares of all steps.
        forecaster, order: fill the cached steps.
        policy: as of `recache_compile.compile`.
        sizes: of pictures, (width, height); several in one artifact.
        batches: pictures per call; several in one artifact.
        prompts: captions of the pictures that are compared; none: our own.
        seed: of the first picture.
        free: what engines leave free beside what differs; see `pipelines.varied`.
    """

    model: str
    config: CompileConfig = field(default_factory=CompileConfig)
    budgets: tuple[int | float, ...] = (5, 10, 15)
    forecaster: str = "taylor"
    order: int = 1
    policy: AnyPolicy = "auto"
    sizes: tuple[tuple[int, int], ...] = ()
    batches: tuple[int, ...] = (1,)
    prompts: tuple[str, ...] = ()
    seed: int = 0
    free: tuple[str, ...] = ()

    @property
    def shapes(self) -> list[dict[str, Any]]:
        """Arguments of the pipeline, one set for each size."""
        call = dict(self.config.call)
        return [{"width": width, "height": height, **call} for width, height in self.sizes] or [call]


@dataclass(frozen=True, slots=True)
class Compilation:
    """What came out.

    Args:
        compiled: engines and plans.
        measured: every budget beside the uncached pipeline.
        artifact: folder that was written.
        picture: file that was written; None where there is none, and `reason` says why.
    """

    compiled: Compiled
    measured: tuple[Measured, ...]
    artifact: Path
    picture: Path | None
    reason: str = ""

    def facts(self) -> dict[str, Any]:
        """What `--json` prints."""
        compiled = self.compiled
        return {
            "artifact": str(self.artifact),
            "picture": str(self.picture) if self.picture else None,
            "num_steps": compiled.num_steps,
            "forecaster": compiled.forecaster.name,
            "order": compiled.forecaster.order,
            "policy": compiled.policy,
            "runtime": compiled.engines.config.runtime,
            "budgets": [asdict(each) for each in self.measured],
        }


def compile_model(request: CompileRequest, folder: Path, runtime: Runtime) -> Compilation:
    """Load, compile, write, draw, compare; everything that can be refused early is.

    Args:
        request: what is asked.
        folder: of the artifact; a picture is written beside it.
        runtime: lowers the programs.

    Raises:
        RecacheError: naming what cannot be done and the remedy.
    """
    config, place = request.config, torch.device(request.config.device)
    check_budgets(request.budgets, config.num_steps)
    if request.policy != "auto":  # what that stands for depends on the pipeline
        early = choose_policy(request.policy, request.budgets, request.forecaster, request.order, config, "")
        if not early.needs_calibration:
            early.answer()
    picture = check_output(folder)
    log.info("loading %s", request.model)
    pipeline = load_pipeline(request.model, getattr(torch, config.dtype), place)
    captions = request.prompts or captions_for(pipeline)
    shapes = request.shapes
    log.info("checking the prompts")
    lengths = prompts_to_build_for(pipeline, captions, shapes[0], config)
    compiled = _compiled(request, pipeline, captions, lengths, runtime)
    log.info("writing %s", folder)
    compiled.save(folder)
    if runtime.engine_device(place) != place:
        reason = f"no picture: engines of {runtime.name} do not run on {place}"
        return Compilation(compiled, tuple(unmeasured(compiled)), folder, None, reason)
    calls = [prompted(pipeline, caption, shapes[0], request.batches[0]) for caption in captions]
    measured, pictures = compare(pipeline, compiled, calls, request.seed, component=config.component)
    if not pictures:
        return Compilation(compiled, tuple(measured), folder, None, "no picture: the pipeline makes no images")
    save_comparison(pictures, compiled.schedules, captions, picture)
    return Compilation(compiled, tuple(measured), folder, picture)


def prompts_to_build_for(
    pipeline: Any, captions: Sequence[str], call: Mapping[str, Any], config: CompileConfig
) -> list[str]:
    """The first prompt, and of the others those that the transformer is called differently for: engines are for all.

    Args:
        pipeline: calls its transformer with what it makes of a prompt.
        captions: the prompts.
        call: further arguments of the pipeline.
        config: tells the steps and the component.

    Raises:
        ModelError: they have several lengths, and sizes are fixed.
    """
    kinds: dict[Any, str] = {}
    for caption in captions:
        made = record_examples(pipeline, config.num_steps, prompted(pipeline, caption, call), config.component)
        kinds.setdefault(frozenset(call_kind(named_leaves(example.inputs)) for example in made), caption)
    chosen = list(kinds.values())
    if len(chosen) > 1 and (config.cuda_graphs or not config.free_sizes):
        raise ModelError(
            f"prompt {chosen[1]!r}: the transformer is called with other shapes than for {captions[0]!r}, and sizes are"
            " fixed: choose prompts of one length, have the pipeline pad them (max_sequence_length), or leave"
            f" {'--cuda-graphs' if config.cuda_graphs else '--fixed-sizes'} out"
        )
    return chosen


def check_output(folder: Path) -> Path:
    """The place of an artifact's picture, once both are known to be writable."""
    check_writable(folder)
    picture = folder.with_name(f"{folder.name}.png")
    check_file(picture)
    if picture.exists() and not folder.exists():
        raise ArtifactError(f"output {folder}: its picture would replace {picture}; name another folder")
    return picture


def _compiled(
    request: CompileRequest, pipeline: Any, captions: Sequence[str], lengths: Sequence[str], runtime: Runtime
) -> Compiled:
    """Engines and plans of a pipeline that is loaded."""
    shapes = request.shapes
    config = replace(request.config, call=shapes[0])
    kind = type(pipeline).__name__
    choice = choose_policy(request.policy, request.budgets, request.forecaster, request.order, config, kind)
    calls: list[Mapping[str, Any]] = [
        prompted(pipeline, caption, each, number)
        for caption in lengths
        for each in shapes
        for number in request.batches
    ]
    engines = engines_of_pipeline(pipeline, config, calls, runtime, free=request.free)
    engines = replace(engines, description=replace(engines.description, model=absolute(request.model)))
    return plan_pipeline(
        engines, choice, pipeline, calibration_calls(pipeline, captions, shapes[0], request.batches[0])
    )
