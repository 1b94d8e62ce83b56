"""Engines for a pipeline's transformer."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from recache_compile.compiler.build import build_engines
from recache_compile.compiler.compiled import Engines
from recache_compile.compiler.examples import alike, differing_sizes, distinct
from recache_compile.config import CompileConfig
from recache_compile.errors import ModelError
from recache_compile.pipelines.record import check_scheduler, denoiser_of, record_examples
from recache_compile.pipelines.varied import varied
from recache_compile.runtimes.base import Runtime

log = logging.getLogger(__name__)


def engines_of_pipeline(
    pipeline: Any,
    config: CompileConfig,
    calls: Sequence[Mapping[str, Any]],
    runtime: Runtime | None = None,
    others: Sequence[tuple[Any, Mapping[str, Any]]] = (),
    free: Sequence[str] = (),
) -> Engines:
    """Record how a pipeline calls its transformer, and build engines for these calls.

    Args:
        pipeline: a `diffusers` pipeline; it is left as it is.
        config: the choices; names the transformer.
        calls: arguments of the pipeline calls that are recorded, at least one.
        runtime: a backend with options of its own, instead of the one that `config` names.
        others: other pipelines that have the same transformer, with the arguments of a call each.
        free: what engines are to leave free beside what differs between the calls; see `pipelines.varied`.

    Raises:
        RecacheError: naming what cannot be done and the remedy.
    """
    module = denoiser_of(pipeline, config.component)
    for other, _ in others:
        if denoiser_of(other, config.component) is not module:
            raise ModelError(
                f"others: the {config.component} of {type(other).__name__} is not that of {type(pipeline).__name__};"
                " make the one from the other (from_pipe)"
            )
    calls = [each for call in calls for each in (varied(pipeline, call, free) if free else [call])]
    several = [*((pipeline, call) for call in calls), *others]
    for each, _ in several:
        check_scheduler(each)
    examples = [
        example for one, call in several for example in record_examples(one, config.num_steps, call, config.component)
    ]
    if free and not any(map(differing_sizes, alike(distinct(examples)))):
        log.warning("free %s: the transformer is called with the same sizes, whatever it is", ", ".join(free))
    return build_engines(module, examples, config, runtime)
